"""Slices and MLPs that the op tests share, and the error measure they use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fips_ext import BlockSparse

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ENCODINGS = ("block", "bitmap")

# Relative error against float64 on the same (rounded) inputs: one rounding of the result for the halves,
# a float32 sum for float32 (KERNELS goal 2e-6).
TOLERANCE = {
    torch.float32: 2e-6,
    torch.bfloat16: 3e-3,
    torch.float16: 4e-4,
    torch.float64: 1e-13,
}


ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")  # each includes those before it


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Runs a test once per instruction set that this processor has."""
    from fips_ext import _host

    if ISAS.index(request.param) > ISAS.index(_host.cpu_features()["detected"]):
        pytest.skip(f"this processor lacks {request.param}")
    monkeypatch.setenv("FIPS_CPU_CAPABILITY", request.param)
    return request.param


def random_slice(
    rows: int,
    cols: int,
    block: tuple[int, int],
    encoding: str,
    dtype: torch.dtype = torch.float64,
    density: float = 0.4,
    seed: int = 0,
) -> BlockSparse:
    """A slice with empty blocks, full blocks and (bitmap) partly filled ones."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    blocks = torch.rand(-(-rows // block[0]), -(-cols // block[1]), generator=generator) < 0.6
    blocks[0, 0] = blocks[-1, -1] = True
    if blocks.numel() > 2:
        blocks[0, -1] = False
    keep = blocks.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :cols]
    if encoding == "bitmap":
        keep = keep & (torch.rand(rows, cols, generator=generator) < density)
    return BlockSparse.from_dense(dense.to(dtype), block, encoding, keep)


def as_double(v: BlockSparse) -> BlockSparse:
    return v.with_values(v.values.double())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``‖actual − expected‖ / ‖expected‖`` in float64 (0 when both are empty or zero)."""
    expected = expected.double()
    norm = expected.norm()
    difference = (actual.double() - expected).norm()
    return float(difference / norm) if norm > 0 else float(difference)


def random_mlp(
    gated: bool,
    bias: bool,
    identity: bool,
    per_role: bool,
    encoding: str,
    dtype: torch.dtype = torch.float64,
    width: int = 24,
    hidden: int = 40,
    rank: int = 18,
    activation: str = "gelu",
    block: tuple[int, int] = (16, 16),
) -> dict:
    """Keyword arguments of ``shared_mlp``; by default slices are ragged against their blocks."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = rank + (width if identity else 0)

    def new_slice(seed):
        return random_slice(rows, hidden, block, encoding, dtype, seed=seed)

    return {
        "base": randn(width, rank) / width**0.5,
        "base_out": randn(width, rank) / width**0.5 if per_role else None,
        "up": new_slice(2),
        "gate": new_slice(3) if gated else None,
        "down": new_slice(4),
        "up_bias": randn(hidden) if bias else None,
        "gate_bias": randn(hidden) if bias and gated else None,
        "down_bias": randn(width) if bias else None,
        "activation": activation,
        "identity": identity,
    }


def leaves(mlp: dict) -> dict[str, Tensor]:
    """The differentiable tensors of ``random_mlp`` by name."""
    found = {}
    for name, value in mlp.items():
        if isinstance(value, BlockSparse):
            found[name] = value.values
        elif isinstance(value, Tensor):
            found[name] = value
    return found


def with_leaves(mlp: dict, values: dict[str, Tensor]) -> dict:
    """``mlp`` with the tensors of ``leaves`` replaced."""
    return {
        name: value.with_values(values[name]) if isinstance(value, BlockSparse) else values.get(name, value)
        for name, value in mlp.items()
    }
