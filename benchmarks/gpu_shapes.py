"""Weights of the GPU benchmarks: the models' shapes, slices in the GPU's default blocks, dense rivals."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from cpu_shapes import MODELS as CPU_MODELS
from cpu_shapes import DenseMlp, Shape, SharedMlp, ZeroFilledMlp
from torch import Tensor

from fips_ext import BlockSparse
from fips_ext.layout import Encoding, grid_shape, pack_bits
from fips_ext.reference import ACTIVATIONS

MODELS = {shape.name: shape for shape in (*CPU_MODELS, Shape("Llama-3-70B", 8192, 28672, "silu", gated=True))}
BATCH_TOKENS = {  # of 64 images
    "DeiT-B": 12608,
    "DINOv2-S": 16448,
    "Swin-L s1": 200704,
    "Swin-L s2": 50176,
    "Swin-L s3": 12544,
    "Swin-L s4": 3136,
}
PREFILL_TOKENS = 4096
TINY = {"d": 128, "n": 256, "tokens": 24}


@dataclasses.dataclass(frozen=True)
class Pattern:
    """What a slice looks like. ``block`` is ``(bk, bn)``; density is nominal: blocks are whole."""

    density: float
    block: tuple[int, int]
    encoding: Encoding = "block"

    def keys(self) -> dict[str, object]:
        block = "x".join(map(str, self.block))
        return {"density": self.density, "block": block, "encoding": self.encoding}


def default_block(rank: int) -> tuple[int, int]:
    """``(bk, bn)``: small slices in 64×64, those of language models in 64 rows by 128 columns."""
    return (64, 64) if rank <= 768 else (64, 128)


def shape_of(name: str, dry_run: bool) -> Shape:
    shape = MODELS[name]
    return dataclasses.replace(shape, d=TINY["d"], n=TINY["n"]) if dry_run else shape


def make_slice(rows: int, cols: int, pattern: Pattern, dtype: torch.dtype, device: str) -> BlockSparse:
    """Random values; ``block``: equally many blocks in every block column, ``bitmap``: all, partly filled."""
    bk, bn = pattern.block
    nbk, nbn = grid_shape(rows, cols, pattern.block)
    bitmap = pattern.encoding == "bitmap"
    kept = nbk if bitmap else max(1, round(pattern.density * nbk))
    order = torch.rand(nbn, nbk, device=device).argsort(1)
    row_idx = order[:, :kept].sort(1).values.flatten().to(torch.int32)
    col_ptr = torch.arange(0, nbn * kept + 1, kept, dtype=torch.int32, device=device)
    values = torch.randn(nbn * kept, bn, bk, device=device) / (pattern.density * rows) ** 0.5
    if bitmap:
        values *= torch.rand(values.shape, device=device) < pattern.density
    values[row_idx == nbk - 1, :, rows - (nbk - 1) * bk :] = 0  # the padding of ragged edges
    values[(nbn - 1) * kept :, cols - (nbn - 1) * bn :] = 0
    values = values.to(dtype)
    stored = values != 0
    mask = pack_bits(stored) if bitmap else None
    values = values[stored] if bitmap else values
    return BlockSparse.from_index(rows, cols, pattern.block, values, col_ptr, row_idx, mask)


def stored_slots(v: BlockSparse) -> int:
    """Slots in stored blocks: what a kernel multiplies."""
    return v.num_blocks * v.block[0] * v.block[1]


class MergedMlp:
    """A gated :class:`DenseMlp` with gate and up in one product, as serving engines run it."""

    def __init__(self, dense: DenseMlp) -> None:
        self.gate_and_up = torch.cat([dense.gate, dense.up])
        self.down, self.activation = dense.down, ACTIVATIONS[dense.activation]

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_and_up).chunk(2, -1)
        return F.linear(self.activation(gate) * up, self.down)


@dataclasses.dataclass(frozen=True)
class Mlps:
    """An MLP on shared factors and its rivals: a dense one of its shape, its own chain with V filled up."""

    ours: SharedMlp
    dense: DenseMlp
    merged: MergedMlp | None
    filled: ZeroFilledMlp

    def forms(self) -> dict[str, object]:
        """Runners by name for a race: ours, every form of the rivals."""
        forms = {"ours": self.ours, "dense": self.dense, "zero-filled": self.filled}
        return forms if self.merged is None else {**forms, "dense/merged": self.merged}


def make_mlps(shape: Shape, rank: int, pattern: Pattern, dtype: torch.dtype, device: str) -> Mlps:
    d, n = shape.d, shape.n

    def randn(*size: int) -> Tensor:
        return (torch.randn(size, device=device) / size[-1] ** 0.5).to(dtype)

    def new_slice() -> BlockSparse:
        return make_slice(rank, n, pattern, dtype, device)

    biases = (None, None) if shape.gated else (randn(n), randn(d))
    gates = (new_slice(), randn(n, d)) if shape.gated else (None, None)
    ours = SharedMlp(
        randn(d, rank), randn(d, rank), new_slice(), gates[0], new_slice(), *biases, shape.activation
    )
    dense = DenseMlp(randn(n, d), gates[1], randn(d, n), *biases, shape.activation)
    return Mlps(ours, dense, MergedMlp(dense) if shape.gated else None, ZeroFilledMlp(ours))
