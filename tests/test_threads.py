"""The ops called from many Python threads at once, and many times."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fips_ext import functional, memory
from fips_ext.layout import BlockSparse

from .checkpoint.toy import compressed_toy

CALLS = 10_000


def slice_of(encoding: str) -> BlockSparse:
    dense = torch.randn(48, 80) * (torch.rand(48, 80) < 0.5)
    return BlockSparse.from_dense(dense, (16, 16), encoding)


@pytest.mark.parametrize("encoding", ["block", "bitmap"])
def test_threads_get_what_one_gets(encoding: str) -> None:
    """Forward and backward, few and many tokens, on shared factors."""
    model = compressed_toy()
    inputs = [torch.randn(tokens, 32) for tokens in (1, 3, 16, 70) for _ in range(4)]
    v = slice_of(encoding)
    rows = [torch.randn(tokens, 48) for tokens in (1, 33) for _ in range(8)]

    def work(i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = inputs[i].clone().requires_grad_()
        y = model(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        return y.detach(), gradient, functional.block_sparse_mm(rows[i], v)

    expected = [work(i) for i in range(len(inputs))]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            for found, wanted in zip(pool.map(work, range(len(inputs))), expected, strict=True):
                for a, b in zip(found, wanted, strict=True):
                    assert torch.equal(a, b)


def test_calls_leak_nothing(single_thread) -> None:
    """Twice as many calls take no more memory than half of them did."""
    model = compressed_toy()
    v = slice_of("bitmap")
    x, rows = torch.randn(5, 32), torch.randn(5, 48)

    def call(times: int) -> int:
        for _ in range(times):
            y = model(x)
            functional.block_sparse_mm(rows, v)
        y.sum().backward()
        gc.collect()
        return memory.resident()

    call(CALLS // 10)  # caches and pools fill
    before = call(CALLS // 2)
    assert call(CALLS // 2) - before < 2**20
