"""The model shapes, weights and case grids of the CPU benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fips_ext import BlockSparse, functional, nn
from fips_ext.layout import Encoding, grid_shape, pack_bits
from fips_ext.quantise import Bits
from fips_ext.reference import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class Shape:
    """An MLP of width d and hidden width n; gated ones have no biases, plain ones have, as in the models."""

    name: str
    d: int
    n: int
    activation: str = "gelu"
    gated: bool = False

    @property
    def matrices(self) -> int:
        return 3 if self.gated else 2


DEIT_B = Shape("DeiT-B", 768, 3072)
SMOLLM2 = Shape("SmolLM2-135M", 576, 1536, "silu", gated=True)
GEMMA_2B = Shape("Gemma-2-2B", 2304, 9216, "gelu_tanh", gated=True)
MODELS = (
    DEIT_B,
    Shape("DINOv2-S", 384, 1536),
    *(Shape(f"Swin-L s{stage}", 192 << stage - 1, 768 << stage - 1) for stage in (1, 2, 3, 4)),
    SMOLLM2,
    GEMMA_2B,
    Shape("Llama-3-8B", 4096, 14336, "silu", gated=True),
)
QUICK_MODELS = (DEIT_B, SMOLLM2, GEMMA_2B)

QUICK_TOKENS = (197, 1576, 1, 8)
TOKENS = (197, 1576, 4096, 1, 8)
DTYPES = (torch.float32, torch.bfloat16)


def shapes_of(text: str | None, quick: bool) -> tuple[Shape, ...]:
    """The shapes of ``--shapes``, or the models. A shape that no model has is a plain MLP."""
    if text is None:
        return QUICK_MODELS if quick else MODELS
    known = {(shape.d, shape.n): shape for shape in MODELS}
    pairs = [tuple(int(edge) for edge in pair.split(",")) for pair in text.split(";") if pair.strip()]
    return tuple(known.get((d, n), Shape("MLP", d, n)) for d, n in pairs)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a slice looks like; ``density`` is nominal, blocks come in whole numbers."""

    shape: Shape
    density: float = 0.25
    block: int = 64
    encoding: Encoding = "block"
    bits: Bits | None = None

    def keys(self) -> dict[str, object]:
        """The keys of a row that describe the slice."""
        return {
            "d": self.shape.d,
            "n": self.shape.n,
            "density": self.density,
            "block": f"{self.block}x{self.block}",
            "encoding": self.encoding,
            **({} if self.bits is None else {"bits": self.bits}),
        }


def settings(shapes: Sequence[Shape], quick: bool) -> list[Setting]:
    """The slices to measure, the most telling first: variants of the first shape, then the other shapes."""
    first, *rest = shapes

    def densities(shape: Shape) -> list[Setting]:
        blocks = [Setting(shape, density) for density in (0.5, 0.1)]
        return [*blocks, Setting(shape, 0.5, encoding="bitmap")]

    def variants(shape: Shape) -> list[Setting]:
        return [*densities(shape), *(Setting(shape, block=block) for block in (16, 32))]

    grid = [Setting(first), *variants(first), *map(Setting, rest)]
    return grid if quick else grid + [setting for shape in rest for setting in densities(shape)]


def make_slice(
    rows: int, cols: int, setting: Setting, dtype: torch.dtype, generator: torch.Generator
) -> BlockSparse:
    """Random values; ``block``: equally many blocks in every block column, ``bitmap``: all, partly filled."""
    edge, density = setting.block, setting.density
    nbk, nbn = grid_shape(rows, cols, (edge, edge))
    bitmap = setting.encoding == "bitmap"
    kept = nbk if bitmap else max(1, round(density * nbk))
    order = torch.rand(nbn, nbk, generator=generator).argsort(1)
    row_idx = order[:, :kept].sort(1).values.flatten().to(torch.int32)
    col_ptr = torch.arange(0, nbn * kept + 1, kept, dtype=torch.int32)
    values = torch.randn(nbn * kept, edge, edge, generator=generator)
    if bitmap:
        values *= torch.rand(values.shape, generator=generator) < density
    values[row_idx == nbk - 1, :, rows - (nbk - 1) * edge :] = 0  # the padding of ragged edges
    values[col_ptr[-2] :, cols - (nbn - 1) * edge :] = 0
    values /= (density * rows) ** 0.5
    stored = values != 0
    mask = pack_bits(stored) if bitmap else None
    values = (values[stored] if bitmap else values).to(dtype)
    v = BlockSparse.from_index(rows, cols, (edge, edge), values, col_ptr, row_idx, mask)
    return v if setting.bits is None else v.quantised(setting.bits)


def stored_share(v: BlockSparse) -> float:
    """The share of the logical matrix that is multiplied: stored slots, those in the padding left out."""
    return int(torch.count_nonzero(v.dequantised().values)) / (v.rows * v.cols)


@dataclasses.dataclass(frozen=True)
class DenseMlp:
    """The model's own MLP, weights ``[out, in]``."""

    up: Tensor
    gate: Tensor | None
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        h = F.linear(x, self.up, self.up_bias)
        h = act(h) if self.gate is None else act(F.linear(x, self.gate)) * h
        return F.linear(h, self.down, self.down_bias)

    def parameters(self) -> list[Tensor]:
        return [t for t in (self.up, self.gate, self.down, self.up_bias, self.down_bias) if t is not None]

    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.parameters())


@dataclasses.dataclass(frozen=True)
class SharedMlp:
    """The same MLP on shared factors with one base per role; the arguments of ``functional.shared_mlp``."""

    base: Tensor
    base_out: Tensor
    up: BlockSparse
    gate: BlockSparse | None
    down: BlockSparse
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        return functional.shared_mlp(x, **self.arguments())

    def module(self) -> nn.SharedMLP:
        """The module a model holds."""
        return nn.SharedMLP(
            nn.SharedBase(self.base),
            nn.SparseFactor(self.up),
            nn.SparseFactor(self.down),
            None if self.gate is None else nn.SparseFactor(self.gate),
            nn.SharedBase(self.base_out),
            self.up_bias,
            None,
            self.down_bias,
            self.activation,
        )

    def arguments(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def slices(self) -> list[BlockSparse]:
        return [v for v in (self.up, self.gate, self.down) if v is not None]

    def _dense_parts(self) -> list[Tensor]:
        return [t for t in (self.base, self.base_out, self.up_bias, self.down_bias) if t is not None]

    def parameters(self) -> list[Tensor]:
        return [*self._dense_parts(), *(v.values for v in self.slices())]

    def nbytes(self) -> int:
        """What a checkpoint stores: values, index, mask, bases and biases."""
        return sum(t.nbytes for t in self._dense_parts()) + sum(v.nbytes() for v in self.slices())

    def flops(self, tokens: int) -> float:
        """Of one forward pass on what is stored."""
        slices = sum(stored_share(v) * v.rows * v.cols for v in self.slices())
        return 2.0 * tokens * (self.base.numel() + self.base_out.numel() + slices)


class ZeroFilledMlp:
    """The chain of :class:`SharedMlp` through the vendor's GEMM, on slices filled up with zeros."""

    def __init__(self, shared: SharedMlp) -> None:
        self.shared = shared
        self.up = shared.up.to_dense().t().contiguous()
        self.gate = None if shared.gate is None else shared.gate.to_dense().t().contiguous()
        self.down = shared.down.to_dense()

    def __call__(self, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.shared.activation]
        z = x @ self.shared.base
        h = F.linear(z, self.up, self.shared.up_bias)
        h = act(h) if self.gate is None else act(F.linear(z, self.gate)) * h
        return F.linear(F.linear(h, self.down), self.shared.base_out, self.shared.down_bias)


def make_mlps(
    setting: Setting, rank: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[SharedMlp, DenseMlp]:
    """An MLP on shared factors of that rank and a dense one of the same shape (of unrelated weights)."""
    shape = setting.shape
    d, n = shape.d, shape.n

    def randn(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) / size[-1] ** 0.5).to(dtype)

    def new_slice() -> BlockSparse:
        return make_slice(rank, n, setting, dtype, generator)

    biases = (None, None) if shape.gated else (randn(n), randn(d))
    gates = (new_slice(), randn(n, d)) if shape.gated else (None, None)
    shared = SharedMlp(
        randn(d, rank), randn(d, rank), new_slice(), gates[0], new_slice(), *biases, shape.activation
    )
    return shared, DenseMlp(randn(n, d), gates[1], randn(d, n), *biases, shape.activation)
