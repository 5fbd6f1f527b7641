"""Slices of codes: what they stand for, and the ops on them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fips_ext import BlockSparse, functional, quantise, reference
from fips_ext.budget import slice_bytes
from fips_ext.errors import InvalidArgument, NumericalError
from fips_ext.recipe import Pattern

from .cases import DTYPES, ENCODINGS, isa, random_mlp, random_slice, relative_error
from .test_shared_mlp import CHAIN_TOLERANCE, flat_arguments

__all__ = ["isa"]

BITS = (8, 4)


def in_double(v: BlockSparse, dtype: torch.dtype) -> BlockSparse:
    """The values that the codes of ``v`` stand for in a product of ``dtype``."""
    plain = v.dequantised(dtype)
    return plain.with_values(plain.values.double())


def quantised_mlp(bits: int, **options) -> tuple[dict, dict]:
    """Arguments of ``shared_mlp`` over codes, and over the values they stand for, float64."""
    mlp = random_mlp(**options)
    dtype = mlp["base"].dtype
    codes, exact = {}, {}
    for name, value in mlp.items():
        codes[name] = value.quantised(bits) if isinstance(value, BlockSparse) else value
        if isinstance(value, BlockSparse):
            exact[name] = in_double(codes[name], dtype)
        else:
            exact[name] = value.double() if isinstance(value, Tensor) else value
    return codes, exact


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    encoding=st.sampled_from(ENCODINGS),
    rows=st.integers(1, 100),
    cols=st.integers(1, 100),
    block=st.tuples(st.sampled_from([16, 32, 64, 128]), st.sampled_from([16, 32, 64, 128])),
    size=st.floats(-12, 5),
    seed=st.integers(0, 99),
)
def test_every_value_is_within_half_a_step(bits, encoding, rows, cols, block, size, seed):
    v = random_slice(rows, cols, block, encoding, torch.float64, seed=seed)
    v = v.with_values(v.values * 10.0**size)
    codes = v.quantised(bits)
    assert codes.bits == bits
    pattern, held = Pattern(encoding, block), codes.values.numel() * 8 // bits
    assert codes.nbytes() == slice_bytes(rows, cols, pattern, v.num_blocks, held, 8, bits)
    if v.num_blocks == 0:
        assert not codes.to_dense().any()
        return
    error = (codes.to_dense() - v.to_dense().float()).abs()
    # Half a step of the row that the value is in; of 4 bits, 0.3 of the largest value may be cut off.
    half_step = 0.505 * float(codes.scales.float().amax())
    cut = 0.31 * float(v.values.abs().amax()) if bits == 4 and v.values.numel() else 0.0
    assert float(error.max()) <= max(half_step, cut)
    again = BlockSparse.from_index(
        rows, cols, block, codes.values, codes.col_ptr, codes.row_idx, codes.mask, codes.scales
    )
    assert torch.equal(again.to_dense(), codes.to_dense())
    assert torch.equal(codes.dequantised().to_dense(), codes.to_dense())


@pytest.mark.parametrize("bits", BITS)
def test_codes_stay_what_they_are(bits):
    """Quantising values that are codes times scales, with these scales, changes nothing."""
    v = random_slice(70, 50, (32, 16), "bitmap", torch.float32)
    once = v.quantised(bits)
    twice = once.dequantised().quantised(bits, once.scales)
    assert torch.equal(once.values, twice.values)


def test_scales_of_four_bits_cut_off_outliers():
    rows = torch.randn(400, 64)
    rows[:, 0] = 6.0
    scales = quantise.choose_scales(rows, 4)
    peak = rows.abs().amax(-1) / 7
    best = (quantise.decode(quantise.encode(rows, scales, 4), scales) - rows).square().sum()
    plain = (quantise.decode(quantise.encode(rows, peak, 4), peak) - rows).square().sum()
    assert float(best) < 0.95 * float(plain)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-9, 1e4])
def test_scales_of_any_size(bits, size):
    scales = quantise.choose_scales(size * torch.randn(5, 32), bits)
    assert scales.dtype == torch.float16
    assert bool(scales.isfinite().all())
    assert bool((scales == 0).all()) == (size == 0)


@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
def test_values_no_scale_can_hold(value):
    with pytest.raises(NumericalError, match="codes of 8 bits reach"):
        quantise.choose_scales(torch.tensor([[1.0, value]]), 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("bits", BITS)
def test_products_match_the_oracle_on_every_isa(isa, dtype, encoding, bits):
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float64: 1e-13}[dtype]
    for rows, cols, block in ((150, 210, (16, 16)), (97, 33, (32, 128)), (300, 260, (128, 64))):
        v = random_slice(rows, cols, block, encoding, torch.float32, density=0.2).quantised(bits)
        exact = in_double(v, dtype)
        for transpose, tokens in itertools.product([False, True], [0, 1, 7, 33, 130]):
            x = torch.randn(tokens, cols if transpose else rows).to(dtype)
            y = functional.block_sparse_mm(x, v, transpose)
            assert y.dtype == dtype
            expected = reference.block_sparse_mm(x.double(), exact, transpose)
            assert relative_error(y, expected) < tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_mlp_matches_the_oracle_on_every_isa(isa, dtype, bits):
    for gated, identity, encoding in itertools.product([False, True], [False, True], ENCODINGS):
        codes, exact = quantised_mlp(
            bits, gated=gated, bias=True, identity=identity, per_role=True, encoding=encoding, dtype=dtype
        )
        for tokens in (1, 12, 50):
            x = torch.randn(tokens, 24).to(dtype)
            y = functional.shared_mlp(x, **codes)
            expected = reference.shared_mlp(x.double(), **exact)
            assert relative_error(y, expected) < CHAIN_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_of_one_mlp_may_differ(isa, dtype):
    """Codes of 8 and of 4 bits and values side by side, on every path."""
    mlp = random_mlp(True, True, True, True, "bitmap", dtype)
    exact = {n: v.double() if isinstance(v, Tensor) else v for n, v in mlp.items()}
    for name, bits in (("up", 8), ("gate", None), ("down", 4)):
        mlp[name] = mlp[name] if bits is None else mlp[name].quantised(bits)
        exact[name] = in_double(mlp[name], dtype)
    for tokens in (1, 12, 50, 300):
        x = torch.randn(tokens, 24).to(dtype)
        expected = reference.shared_mlp(x.double(), **exact)
        assert relative_error(functional.shared_mlp(x, **mlp), expected) < CHAIN_TOLERANCE[dtype]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_gradients_pass_codes_by(bits, encoding):
    """Of x, bases and biases they are those over the values; codes have none."""
    codes, exact = quantised_mlp(
        bits, gated=True, bias=True, identity=False, per_role=True, encoding=encoding, dtype=torch.float64
    )
    x = torch.randn(5, 24, dtype=torch.float64)
    found = []
    for call, arguments in ((functional.shared_mlp, codes), (reference.shared_mlp, exact)):
        leaf = x.clone().requires_grad_()
        named = {k: v.clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        y = call(leaf, **named)
        wanted = [leaf, *[v for v in named.values() if isinstance(v, Tensor)]]
        found.append(torch.autograd.grad(y.square().sum(), wanted))
    for op, oracle in zip(*found, strict=True):
        assert relative_error(op, oracle) < 1e-6  # codes are decoded in float32
    v = codes["up"]
    leaf = torch.randn(3, v.rows, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: functional.block_sparse_mm(t, v), (leaf,))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("bits", BITS)
def test_opcheck(bits, encoding):
    codes, _ = quantised_mlp(
        bits, gated=True, bias=False, identity=True, per_role=False, encoding=encoding, dtype=torch.float32
    )
    x = torch.randn(5, 24, requires_grad=True)
    torch.library.opcheck(torch.ops.fips.shared_mlp.default, (x, *flat_arguments(codes)))
    v = codes["up"]
    x = torch.randn(4, v.rows, requires_grad=True)
    arguments = (x, v.tensors(), v.rows, v.cols, False, None)
    torch.library.opcheck(torch.ops.fips.block_sparse_mm.default, arguments)


def test_autocast_of_no_slice_says_so():
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="a slice is 6 tensors"):
        torch.ops.fips.block_sparse_mm(torch.randn(3, 4), [], 4, 5, False, None)


def test_autocast_leaves_scales_alone():
    v = random_slice(40, 50, (16, 16), "bitmap", torch.float32).quantised(8)
    x = torch.randn(6, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = functional.block_sparse_mm(x, v)
    assert torch.equal(y, functional.block_sparse_mm(x.bfloat16(), v))


def test_refusals_say_what_is_wrong():
    v = random_slice(40, 50, (16, 16), "bitmap", torch.float32).quantised(8)
    x = torch.randn(3, 40)
    values, *index, scales = v.tensors()
    for tensors, message in (
        ([values, *index], "values: dtype is Char, but x is Float"),
        ([values.float(), *index, scales], "of a slice with scales it is int8"),
        ([values, *index, scales.float()], r"scales: dtype is Float; expected Half"),
        ([values, *index, scales[1:]], r"scales: expected shape \[\d+, 16\], got"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.fips.block_sparse_mm(x, tensors, 40, 50, False, None)
    with pytest.raises(ValueError, match="quantised and have no gradient"):
        functional.block_sparse_sddmm(x, torch.randn(3, 50), v)
    codes, _ = quantised_mlp(
        8, gated=False, bias=False, identity=True, per_role=False, encoding="block", dtype=torch.float32
    )
    with pytest.raises(ValueError, match="up: its values are quantised"):
        functional.reconstruction_loss(torch.randn(3, 24), torch.randn(3, 24), 1.0, **codes)
    parts = (40, 50, (16, 16))
    for scales_, message in (
        (None, "are codes; pass their scales"),
        (scales.float(), "scales: expected float16"),
        (torch.full_like(scales, torch.nan), "scales: hold NaN, Inf or negative"),
        (-scales, "scales: hold NaN, Inf or negative"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            BlockSparse.from_index(*parts, v.values, v.col_ptr, v.row_idx, v.mask, scales_)
    with pytest.raises(InvalidArgument, match="are no codes"):
        BlockSparse.from_index(*parts, v.values.float(), v.col_ptr, v.row_idx, v.mask, scales)
