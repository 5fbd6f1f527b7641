"""Every op on its CUDA path against the float64 oracle: emulated anywhere, on a GPU where there is one."""

from __future__ import annotations

import itertools

import pytest
import torch

from fips_ext import BlockSparse, reference

from ..devices import cuda
from .cases import (
    ENCODINGS,
    TOLERANCE,
    as_double,
    leaves,
    random_mlp,
    random_slice,
    relative_error,
    with_leaves,
)
from .test_shared_mlp import CHAIN_TOLERANCE, flat_arguments, in_double

__all__ = ["cuda"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRADIENTS = ("x", "base", "base_out", "up", "gate", "down", "up_bias", "gate_bias", "down_bias")


def randn(*shape: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oracle_gradients(mlp: dict, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients in float64 by name, from the oracle."""
    arguments = in_double(mlp)
    inputs = {name: t.clone().requires_grad_() for name, t in leaves(arguments).items()}
    data = x.double().requires_grad_()
    y = reference.shared_mlp(data, **with_leaves(arguments, inputs))
    return dict(
        zip(["x", *inputs], torch.autograd.grad(y, [data, *inputs.values()], grad.double()), strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("transpose", [False, True])
def test_block_sparse_mm(cuda, dtype, encoding, transpose):
    for tokens, (bk, bn) in itertools.product((0, 1, 70), ((16, 32), (64, 16))):
        v = random_slice(75, 53, (bk, bn), encoding, dtype)
        x = randn(tokens, 53 if transpose else 75, dtype=dtype)
        bias = randn(75 if transpose else 53, dtype=dtype, seed=2)
        expected = reference.block_sparse_mm(x.double(), as_double(v), transpose, bias.double())
        y = cuda.ops.block_sparse_mm(
            cuda.put(x), cuda.put(v.tensors()), v.rows, v.cols, transpose, cuda.put(bias)
        )
        assert y.dtype == dtype
        assert relative_error(y.cpu(), expected) <= TOLERANCE[dtype]


@pytest.fixture
def tf32_switch():
    """torch's switch, put back after the test."""
    before = torch.backends.cuda.matmul.allow_tf32
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.allow_tf32 = before


def test_tf32_follows_torchs_switch(cuda, tf32_switch):
    v = random_slice(75, 53, (16, 32), "block", torch.float32)
    x = randn(40, 75, dtype=torch.float32)
    expected = reference.block_sparse_mm(x.double(), as_double(v))
    errors = []
    for allowed in (False, True):
        tf32_switch.allow_tf32 = allowed
        y = cuda.ops.block_sparse_mm(cuda.put(x), cuda.put(v.tensors()), v.rows, v.cols, False, None)
        errors.append(relative_error(y.cpu(), expected))
    assert errors[0] <= TOLERANCE[torch.float32]
    assert TOLERANCE[torch.float32] < errors[1] <= 5e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("block", [(16, 16), (32, 64), (128, 128)], ids=str)
def test_block_sparse_sddmm(cuda, dtype, encoding, block):
    # Few blocks of a wide slice are sampled, many of a small one are multiplied densely.
    for rows, cols, kept in ((300, 280, 0.1), (40, 60, 0.9)):
        generator = torch.Generator().manual_seed(0)
        grid = torch.rand(-(-rows // block[0]), -(-cols // block[1]), generator=generator) < kept
        grid[0, 0] = True
        keep = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :cols]
        v = BlockSparse.from_dense(torch.zeros(rows, cols, dtype=dtype), block, encoding, keep)
        for tokens in (0, 3, 100):
            a, b = randn(tokens, rows, dtype=dtype), randn(tokens, cols, dtype=dtype, seed=2)
            expected = reference.block_sparse_sddmm(a.double(), b.double(), as_double(v))
            got = cuda.ops.block_sparse_sddmm(cuda.put(a), cuda.put(b), cuda.put(v.tensors()), v.rows, v.cols)
            assert got.dtype == dtype
            assert relative_error(got.cpu(), expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_shared_mlp(cuda, dtype, activation):
    for gated, encoding, tokens in itertools.product([False, True], ENCODINGS, [16, 70]):
        mlp = random_mlp(gated, True, False, True, encoding, dtype, activation=activation)
        x = randn(tokens, 24, dtype=dtype)
        y = cuda.ops.shared_mlp(cuda.put(x), *cuda.put(flat_arguments(mlp)))
        expected = reference.shared_mlp(x.double(), **in_double(mlp))
        assert relative_error(y.cpu(), expected) < CHAIN_TOLERANCE[dtype]


def fused_tokens() -> int:
    """Tokens for which a GPU runs the fused kernel (prefers_fused_mlp)."""
    return 32 * torch.cuda.get_device_properties(0).multi_processor_count + 64


@pytest.mark.parametrize("many", [False, True])
def test_every_slice_may_have_blocks_of_its_own(cuda, many):
    # Emulated, thousands take minutes: there tests/cpp/test_cuda_fused.cpp calls the fused kernel itself.
    tokens = 5 if not many else 70 if cuda.device == "cpu" else fused_tokens()
    mlp = random_mlp(True, True, False, True, "block", torch.bfloat16, 64, 90, 48)
    for seed, (role, block) in enumerate((("up", (16, 16)), ("gate", (64, 16)), ("down", (32, 16)))):
        mlp[role] = random_slice(48, 90, block, "block", torch.bfloat16, seed=seed)
    x = randn(tokens, 64, dtype=torch.bfloat16)
    y = cuda.ops.shared_mlp(cuda.put(x), *cuda.put(flat_arguments(mlp)))
    expected = reference.shared_mlp(x.double(), **in_double(mlp))
    assert relative_error(y.cpu(), expected) < CHAIN_TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("per_role", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients(cuda, dtype, identity, per_role, bias):
    for gated, encoding in itertools.product([False, True], ENCODINGS):
        mlp = random_mlp(gated, bias, identity, per_role, encoding, dtype, activation="silu")
        x, grad = randn(5, 9, 24, dtype=dtype), randn(5, 9, 24, dtype=dtype, seed=2)
        found = cuda.ops.shared_mlp_backward(cuda.put(grad), cuda.put(x), *cuda.put(flat_arguments(mlp)))
        by_name = dict(zip(GRADIENTS, found, strict=True))
        for name, expected in oracle_gradients(mlp, x, grad).items():
            assert by_name[name].dtype == dtype
            assert relative_error(by_name[name].cpu(), expected) < 2 * CHAIN_TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_reconstruction_loss(cuda, dtype, weighted):
    mlp = random_mlp(True, True, False, True, "block", dtype, activation="gelu")
    x, target = 0.1 * randn(40, 24, dtype=dtype), randn(40, 24, dtype=dtype, seed=2)
    weight = torch.rand(40) if weighted else None
    scale = 1.0 / float(target.double().square().sum())
    loss, *found = cuda.ops.reconstruction_loss(
        cuda.put(x), cuda.put(target), cuda.put(weight), scale, *cuda.put(flat_arguments(mlp))
    )
    arguments = in_double(mlp)
    inputs = {name: t.clone().requires_grad_() for name, t in leaves(arguments).items()}
    expected = reference.reconstruction_loss(
        x.double(), target.double(), scale, token_weight=weight, **with_leaves(arguments, inputs)
    )
    assert loss.dtype == torch.float32
    assert relative_error(loss.cpu(), expected.detach()) < CHAIN_TOLERANCE[dtype]
    wanted = dict(zip(inputs, torch.autograd.grad(expected, list(inputs.values())), strict=True))
    for name, gradient in zip(GRADIENTS[1:], found, strict=True):
        assert gradient.dtype == torch.float32
        assert relative_error(gradient.cpu(), wanted[name]) < 3 * CHAIN_TOLERANCE[dtype], name


def test_gradients_are_the_same_every_time(cuda):
    mlp = cuda.put(flat_arguments(random_mlp(True, True, False, True, "block", torch.bfloat16)))
    x, grad = (cuda.put(randn(90, 24, dtype=torch.bfloat16, seed=seed)) for seed in (1, 2))
    first = cuda.ops.shared_mlp_backward(grad, x, *mlp)
    second = cuda.ops.shared_mlp_backward(grad, x, *mlp)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(cuda, tokens):
    mlp = random_mlp(True, True, True, True, "block", torch.float32)
    arguments = cuda.put(flat_arguments(mlp))
    x = cuda.put(randn(tokens, 24, dtype=torch.float32))
    assert cuda.ops.shared_mlp(x, *arguments).shape == (tokens, 24)
    gradients = cuda.ops.shared_mlp_backward(x, x, *arguments)
    assert gradients[0].shape == (tokens, 24)
    assert tokens > 0 or not gradients[1].any()


def test_float64_is_refused(cuda):
    mlp = cuda.put(flat_arguments(random_mlp(False, False, False, False, "block", torch.float64)))
    with pytest.raises((ValueError, RuntimeError), match="float64 has no CUDA kernel"):
        cuda.ops.shared_mlp(cuda.put(torch.randn(3, 24, dtype=torch.float64)), *mlp)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block", [(16, 16), (64, 32)], ids=str)
def test_codes_compute_what_their_values_do(cuda, dtype, bits, block):
    """Few tokens: the decode kernel reads codes. More: values are made of them first."""
    for encoding, tokens in itertools.product(ENCODINGS, [1, 16, 70]):
        mlp = random_mlp(
            True, True, True, True, encoding, dtype, hidden=120, rank=40, activation="silu", block=block
        )
        codes = {n: v.quantised(bits) if isinstance(v, BlockSparse) else v for n, v in mlp.items()}
        plain = {n: v.dequantised(dtype) if isinstance(v, BlockSparse) else v for n, v in codes.items()}
        x = cuda.put(randn(tokens, 24, dtype=dtype))
        found, expected = (
            cuda.ops.shared_mlp(x, *cuda.put(flat_arguments(arguments))) for arguments in (codes, plain)
        )
        assert torch.equal(found, expected)
        v = codes["up"]
        with pytest.raises(ValueError, match="quantised and have no gradient"):
            cuda.ops.block_sparse_sddmm(
                x.new_zeros(3, v.rows), x.new_zeros(3, v.cols), cuda.put(v.tensors()), v.rows, v.cols
            )
