"""Errors against float64 on the CPU: no larger than those of the vendor's dense products of the same weights,
on every instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fips_ext import BlockSparse, functional, reference
from fips_ext.layout import Encoding

from .cases import isa  # noqa: F401

D, R, N, TOKENS = 96, 80, 200, (1, 5, 40)
FLOAT32_BOUND, VENDOR_FACTOR = 2e-6, 1.1
HALVES = (torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("isa")


def randn(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slice_of(dtype: torch.dtype, encoding: Encoding, seed: int) -> BlockSparse:
    v = randn(R, N, seed=seed) / R**0.5
    if encoding == "bitmap":
        v *= torch.rand(v.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    else:
        v[32:64, 64:128] = 0
    return BlockSparse.from_dense(v.to(dtype), (32, 64), encoding)


def arguments(dtype: torch.dtype, encoding: Encoding) -> dict:
    return {
        "base": (randn(D, R, seed=1) / D**0.5).to(dtype),
        "base_out": (randn(D, R, seed=2) / R**0.5).to(dtype),
        "up": slice_of(dtype, encoding, 3),
        "gate": slice_of(dtype, encoding, 4),
        "down": slice_of(dtype, encoding, 5),
        "activation": "silu",
    }


def in_float64(kwargs: dict) -> dict:
    def double(value):
        if isinstance(value, Tensor):
            return value.double()
        return value.with_values(value.values.double()) if isinstance(value, BlockSparse) else value

    return {name: double(value) for name, value in kwargs.items()}


def error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def check(dtype: torch.dtype, ours: Tensor, vendors: Tensor, exact: Tensor) -> None:
    bound = FLOAT32_BOUND if dtype == torch.float32 else VENDOR_FACTOR * error(vendors, exact)
    assert error(ours, exact) <= bound


@pytest.mark.parametrize("encoding", ["block", "bitmap"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("tokens", TOKENS)
def test_products(tokens: int, dtype: torch.dtype, encoding: Encoding) -> None:
    v = slice_of(dtype, encoding, 6)
    for transpose, features in ((False, R), (True, N)):
        x = randn(tokens, features, seed=7).to(dtype)
        dense = v.to_dense()
        exact = x.double() @ (dense.t() if transpose else dense).double()
        vendors = x @ (dense.t() if transpose else dense)
        check(dtype, functional.block_sparse_mm(x, v, transpose), vendors, exact)


@pytest.mark.parametrize("encoding", ["block", "bitmap"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_whole_mlp_and_its_gradients(tokens: int, dtype: torch.dtype, encoding: Encoding) -> None:
    kwargs = arguments(dtype, encoding)
    x = randn(tokens, D, seed=8).to(dtype).requires_grad_()
    base = kwargs["base"].requires_grad_()
    grad_y = randn(tokens, D, seed=9).to(dtype)

    def run(mlp, x: Tensor, kwargs: dict, grad_y: Tensor) -> list[Tensor]:
        y = mlp(x, **kwargs)
        return [y, *torch.autograd.grad(y, (x, kwargs["base"]), grad_y)]

    ours = run(functional.shared_mlp, x, kwargs, grad_y)
    vendors = run(reference.shared_mlp, x, kwargs, grad_y)
    double = {**in_float64(kwargs), "base": base.detach().double().requires_grad_()}
    exact = run(reference.shared_mlp, x.detach().double().requires_grad_(), double, grad_y.double())
    for actual, vendor, expected in zip(ours, vendors, exact, strict=True):
        check(dtype, actual, vendor, expected)
