from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fips_ext import BlockSparse, functional, reference

from .cases import DTYPES, ENCODINGS, TOLERANCE, as_double, isa, random_slice, relative_error

__all__ = ["isa"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("transpose", [False, True])
def test_matches_oracle_on_every_isa(isa, dtype, encoding, transpose):
    for rows, cols, block in (
        (150, 210, (16, 16)),
        (97, 33, (32, 128)),
        (128, 256, (64, 16)),
        (5, 300, (128, 64)),
    ):
        v = random_slice(rows, cols, block, encoding, dtype)
        for tokens in (0, 1, 7, 9, 33, 130):
            generator = torch.Generator().manual_seed(tokens)
            x = torch.randn(tokens, cols if transpose else rows, generator=generator).to(dtype)
            bias = torch.randn(rows if transpose else cols, generator=generator).to(dtype)
            y = functional.block_sparse_mm(x, v, transpose, bias)
            expected = reference.block_sparse_mm(x.double(), as_double(v), transpose, bias.double())
            assert y.dtype == dtype
            assert y.shape == expected.shape
            assert relative_error(y, expected) < TOLERANCE[dtype]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 140),
    cols=st.integers(1, 140),
    bk=st.sampled_from([16, 32, 64, 128]),
    bn=st.sampled_from([16, 32, 64, 128]),
    encoding=st.sampled_from(ENCODINGS),
    tokens=st.integers(0, 70),
    transpose=st.booleans(),
)
def test_equals_the_dense_product(rows, cols, bk, bn, encoding, tokens, transpose):
    v = random_slice(rows, cols, (bk, bn), encoding, seed=rows * 1000 + cols)
    x = torch.randn(tokens, cols if transpose else rows, dtype=torch.float64)
    dense = v.to_dense()
    expected = x @ (dense.t() if transpose else dense)
    assert relative_error(functional.block_sparse_mm(x, v, transpose), expected) < 1e-12


@settings(max_examples=30, deadline=None)
@given(encoding=st.sampled_from(ENCODINGS), tokens=st.integers(1, 50), seed=st.integers(0, 99))
def test_adjointness(encoding, tokens, seed):
    """⟨x V, y⟩ = ⟨x, y Vᵀ⟩ = ⟨V, xᵀ y⟩ on the stored slots."""
    v = random_slice(45, 70, (16, 32), encoding, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 45, dtype=torch.float64, generator=generator)
    y = torch.randn(tokens, 70, dtype=torch.float64, generator=generator)
    forward = (functional.block_sparse_mm(x, v) * y).sum()
    backward = (x * functional.block_sparse_mm(y, v, transpose=True)).sum()
    sampled = (v.values * functional.block_sparse_sddmm(x, y, v)).sum()
    torch.testing.assert_close(forward, backward)
    torch.testing.assert_close(forward, sampled)


def test_leading_dimensions_and_strides():
    v = random_slice(40, 50, (16, 16), "block")
    x = torch.randn(3, 40, 2, 5, dtype=torch.float64).permute(3, 0, 2, 1)  # [5, 3, 2, 40], not contiguous
    y = functional.block_sparse_mm(x, v)
    assert y.shape == (5, 3, 2, 50)
    assert relative_error(y, reference.block_sparse_mm(x, v)) < 1e-13
    vector = functional.block_sparse_mm(x[0, 0, 0], v)
    assert relative_error(vector, y[0, 0, 0]) < 1e-13


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_nothing_stored(encoding):
    v = BlockSparse.from_dense(torch.zeros(20, 30), (16, 16), encoding)
    assert v.num_blocks == 0
    x, bias = torch.randn(40, 20), torch.randn(30)
    assert torch.equal(functional.block_sparse_mm(x, v, bias=bias), bias.expand(40, 30))
    assert functional.block_sparse_sddmm(x, torch.randn(40, 30), v).numel() == 0


def test_gradients_of_an_empty_output():
    v = BlockSparse.from_dense(torch.zeros(20, 0), (16, 16))
    x = torch.randn(3, 20, requires_grad=True)
    bias = torch.zeros(0, requires_grad=True)
    functional.block_sparse_mm(x, v, bias=bias).sum().backward()
    assert bool((x.grad == 0).all())
    assert bias.grad.shape == (0,)


def test_threads_do_not_change_the_result():
    v = random_slice(300, 400, (32, 32), "block", torch.float32)
    x = torch.randn(200, 300)
    grad = torch.randn(200, 400)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append((functional.block_sparse_mm(x, v), functional.block_sparse_sddmm(x, grad, v)))
    finally:
        torch.set_num_threads(threads)
    for product, sampled in results[1:]:
        assert torch.equal(product, results[0][0])
        assert torch.equal(sampled, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_sddmm_matches_oracle_on_every_isa(isa, dtype, encoding):
    for rows, cols, block in ((150, 210, (16, 16)), (97, 33, (32, 128)), (70, 130, (128, 64))):
        v = random_slice(rows, cols, block, encoding, dtype)
        for tokens in (0, 1, 7, 70, 130):
            a, b = torch.randn(tokens, rows).to(dtype), torch.randn(tokens, cols).to(dtype)
            actual = functional.block_sparse_sddmm(a, b, v)
            expected = reference.block_sparse_sddmm(a.double(), b.double(), as_double(v))
            assert actual.shape == v.values.shape
            assert relative_error(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("transpose", [False, True])
def test_opcheck_and_gradcheck(encoding, transpose):
    v = random_slice(20, 35, (16, 16), encoding)
    x = torch.randn(2, 3, 35 if transpose else 20, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(20 if transpose else 35, dtype=torch.float64, requires_grad=True)
    values = v.values.clone().requires_grad_()
    tensors = [values, *v.tensors()[1:]]
    torch.library.opcheck(torch.ops.fips.block_sparse_mm.default, (x, tensors, 20, 35, transpose, bias))

    def product(x, values, bias):
        return functional.block_sparse_mm(x, v.with_values(values), transpose, bias)

    assert torch.autograd.gradcheck(product, (x, values, bias))
    assert torch.autograd.gradgradcheck(product, (x, values, bias))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_sddmm_opcheck_and_gradcheck(encoding):
    v = random_slice(20, 35, (16, 16), encoding)
    a = torch.randn(4, 20, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 35, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.fips.block_sparse_sddmm.default, (a, b, v.tensors(), 20, 35))
    assert torch.autograd.gradcheck(lambda a, b: functional.block_sparse_sddmm(a, b, v), (a, b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    v = random_slice(40, 50, (16, 16), "bitmap", torch.float32)
    x = torch.randn(6, 40)
    with torch.autocast("cpu", dtype=dtype):
        y = functional.block_sparse_mm(x, v)
    assert y.dtype == dtype
    rounded = v.with_values(v.values.to(dtype))
    assert torch.equal(y, functional.block_sparse_mm(x.to(dtype), rounded))
