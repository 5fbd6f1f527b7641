"""block_sparse_mm on a GPU against cuBLAS on the same dense shape and on a zero-filled V, and torch BSR.

``e`` is FLOP/s on stored blocks over the FLOP/s of cuBLAS on the same dense shape, with random weights: on
zeros cuBLAS is faster, which counts in ``best_ratio`` alone. Up to 64 tokens are decoding: graph replays
through as many slices as keep them out of the L2; ``copy_share`` is the rate of the stored bytes over the
copy bandwidth measured in the same run.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
import triton_bsr
from gpu_shapes import TINY, Pattern, make_slice, stored_slots
from gpu_timing import Bench, check_close, describe
from race import Row, dtype_name, measured
from torch import Tensor

from fips_ext import BlockSparse, functional

DECODE_TOKENS = 64
Shape = tuple[int, int]
LARGE, VISION, DECODE = (2048, 8192), (768, 3072), (2048, 14336)


@dataclasses.dataclass(frozen=True)
class Case:
    """One product; ``shape`` is (r, n), blocks are (bk, bn)."""

    tokens: int
    shape: Shape
    pattern: Pattern
    transpose: bool = False
    dtype: torch.dtype = torch.bfloat16
    quick: bool = False

    def keys(self) -> Row:
        r, n = self.shape
        return {
            "case": f"{r}x{n}{' transposed' if self.transpose else ''}",
            "dtype": dtype_name(self.dtype),
            "T": self.tokens,
            "r": r,
            "n": n,
            "transpose": self.transpose,
            **self.pattern.keys(),
        }

    def races_triton(self) -> bool:
        """Compiling takes Triton a second and more, so it runs the shapes of the goals alone."""
        plain = self.pattern.encoding == "block" and not self.transpose and self.dtype == torch.bfloat16
        return plain and (self.tokens, *self.shape, self.pattern.block) in triton_bsr.SHAPES


def forward_cases() -> Iterator[Case]:
    for density in (0.25, 0.5, 0.1):
        yield Case(4096, LARGE, Pattern(density, (64, 128)), quick=density == 0.25)
    yield Case(12608, VISION, Pattern(0.25, (64, 64)), quick=True)
    for edge in (32, 16):
        yield Case(4096, LARGE, Pattern(0.1, (edge, edge)), quick=True)
    yield Case(16, DECODE, Pattern(0.25, (64, 64)), quick=True)
    for tokens in (1, 8):
        yield Case(tokens, DECODE, Pattern(0.5, (64, 128)), quick=True)
    yield Case(1, DECODE, Pattern(0.5, (64, 64), "bitmap"), quick=True)
    yield Case(8, DECODE, Pattern(0.5, (64, 64)))
    yield Case(12608, VISION, Pattern(0.1, (64, 64)))
    yield Case(4096, LARGE, Pattern(0.25, (64, 64)))
    yield Case(512, LARGE, Pattern(0.25, (64, 128)))
    yield Case(64, DECODE, Pattern(0.5, (64, 64), "bitmap"))


def cases(quick: bool) -> list[Case]:
    forward = list(forward_cases())
    if quick:
        return [case for case in forward if case.quick]
    other = [
        dataclasses.replace(forward[0], dtype=dtype, tokens=tokens)
        for dtype, tokens in ((torch.float16, 4096), (torch.float32, 1024))
    ]
    return [*forward, *(dataclasses.replace(case, transpose=True) for case in forward), *other]


def tiny(case: Case) -> Case:
    pattern = dataclasses.replace(case.pattern, block=tuple(min(64, edge) for edge in case.pattern.block))
    return dataclasses.replace(
        case, tokens=min(case.tokens, TINY["tokens"]), shape=(TINY["d"], TINY["n"]), pattern=pattern
    )


@dataclasses.dataclass(frozen=True)
class Layer:
    """One slice and the same product's dense weights ``[out, in]``: zero-filled, and without zeros."""

    v: BlockSparse
    filled: Tensor
    dense: Tensor
    bsr: Tensor | None

    @classmethod
    def make(cls, case: Case, races_triton: bool, device: str) -> Layer:
        v = make_slice(*case.shape, case.pattern, case.dtype, device)
        filled = v.to_dense() if case.transpose else v.to_dense().t().contiguous()
        bk, bn = case.pattern.block
        bsr = filled.to_sparse_bsr((bn, bk)) if races_triton else None
        return cls(v, filled, torch.randn_like(filled), bsr)


def one_after_another(runs: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    return [run() for run in runs]


def runners(layers: Sequence[Layer], x: Tensor, transpose: bool) -> tuple[dict, Row]:
    """What races, and the error row of a Triton that cannot be tuned."""
    each: dict[str, list[Callable[[], Tensor]]] = {
        "ours": [functools.partial(functional.block_sparse_mm, x, layer.v, transpose) for layer in layers],
        "dense": [functools.partial(F.linear, x, layer.dense) for layer in layers],
        "zero-filled": [functools.partial(F.linear, x, layer.filled) for layer in layers],
    }
    failed: Row = {}
    if layers[0].bsr is not None:
        wide = x.t().contiguous()
        try:
            meta = triton_bsr.tune(layers[0].bsr, wide)
            each["triton"] = [triton_bsr.product(layer.bsr, wide, meta) for layer in layers]
            each["triton/view"] = [triton_bsr.product(layer.bsr, x.t(), meta) for layer in layers]
        except Exception as error:
            failed = {"triton_error": describe(error)}
    return {name: functools.partial(one_after_another, runs) for name, runs in each.items()}, failed


def measure(bench: Bench, named: Case) -> Iterator[Row]:
    case = tiny(named) if bench.dry_run else named
    r, n = case.shape
    x = bench.randn(case.tokens, n if case.transpose else r, dtype=case.dtype)
    make = functools.partial(Layer.make, case, named.races_triton(), bench.device)
    layer = make()
    with torch.no_grad():
        ours = functional.block_sparse_mm(x, layer.v, case.transpose)
        found = check_close(ours, F.linear(x, layer.filled))
    decoding = named.tokens <= DECODE_TOKENS
    count = bench.layers(layer.v.nbytes()) if decoding else 1
    layers = [layer, *(make() for _ in range(count - 1))]
    runs, failed = runners(layers, x, case.transpose)
    race = bench.race(runs, graph=decoding).per_item(count)
    row = race.row() | failed
    row["e"] = race.ratio("dense") * stored_slots(layer.v) / (r * n)
    row["best_ratio"] = race.ratio("dense", "zero-filled")
    row["difference"] = found
    if decoding:
        nbytes, dense_nbytes = layer.v.nbytes(), layer.dense.nbytes
        row |= {"layers": count, "our_bytes": nbytes, "dense_bytes": dense_nbytes}
        row["copy_share"] = nbytes / race.seconds() / bench.machine["copy_bytes_per_s"]
        row["byte_limit_share"] = race.ratio("dense") * nbytes / dense_nbytes
    yield measured(row)


def main(argv: Sequence[str] | None = None) -> int:
    bench = Bench(__doc__, "block_sparse_mm", 50.0, argv)
    for case in cases(bench.quick):
        bench.attempt(case.keys(), functools.partial(measure, bench, case))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
