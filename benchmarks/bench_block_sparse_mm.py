"""block_sparse_mm on a CPU against the vendor's GEMM on the same dense shape, and torch's BSR and CSR.

    python benchmarks/bench_block_sparse_mm.py --quick --json mm.json

``V`` is ``d × n``; ``x·V`` maps ``[T, d] → [T, n]``, ``h·Vᵀ`` maps back. ``e`` is the FLOP rate on stored
values over the rate of the dense product. A V filled up with zeros costs the vendor's GEMM exactly what a
dense matrix costs, so the row against ``dense`` answers for both.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from cpu_shapes import (
    DTYPES,
    QUICK_TOKENS,
    TOKENS,
    Setting,
    Shape,
    make_slice,
    settings,
    shapes_of,
    stored_share,
)
from cpu_timing import Goal, Session, seconds_of
from race import Row, dtype_name
from torch import Tensor

from fips_ext import BlockSparse, functional

EFFICIENCY = Goal("G13", "e", 0.65)
OVER_BSR = Goal("G13", "ratio", 10.0)
OVER_ONEDNN = Goal("G14", "ratio", 1.5)
PREFILL_TOKENS = 197  # from here on the goals on arithmetic hold
SLOWEST_SPARSE_S = 2.0  # a torch.sparse product that would take longer is left out


@dataclasses.dataclass(frozen=True)
class Case:
    setting: Setting
    dtype: torch.dtype
    tokens: int
    transpose: bool
    sparse_rivals: tuple[str, ...] = ()

    def keys(self) -> Row:
        direction = "h·Vᵀ" if self.transpose else "x·V"
        return {
            "case": f"{self.setting.shape.name} {direction}",
            "dtype": dtype_name(self.dtype),
            "T": self.tokens,
            "direction": direction,
            **self.setting.keys(),
        }

    def goal(self) -> Goal | None:
        """Of the row against the dense product."""
        if self.tokens < PREFILL_TOKENS or self.setting.encoding != "block":
            return None
        if self.dtype == torch.float32:
            return EFFICIENCY
        return OVER_ONEDNN if self.dtype == torch.bfloat16 and self.setting.density == 0.25 else None


def cases(shapes: Sequence[Shape], quick: bool) -> Iterator[Case]:
    """The most telling first."""
    for setting in settings(shapes, quick):
        for dtype, tokens in itertools.product(DTYPES, QUICK_TOKENS if quick else TOKENS):
            rivals = sparse_rivals(setting, dtype, tokens, quick) if setting.shape == shapes[0] else ()
            yield Case(setting, dtype, tokens, False, rivals)
            yield Case(setting, dtype, tokens, True)
    if not quick:
        for tokens, transpose in itertools.product((197, 1576), (False, True)):
            yield Case(Setting(shapes[0]), torch.float16, tokens, transpose)


def sparse_rivals(setting: Setting, dtype: torch.dtype, tokens: int, quick: bool) -> tuple[str, ...]:
    """torch.sparse knows float32 only, and is too slow to run along everywhere."""
    if setting.encoding != "block" or dtype != torch.float32:
        return ()
    if tokens not in ((197,) if quick else (197, 1576)):
        return ()
    return ("torch BSR", "torch CSR") if setting == Setting(setting.shape) else ("torch BSR",)


@functools.lru_cache(maxsize=1)  # neighbouring cases share their weights
def weights_of(setting: Setting, dtype: torch.dtype, seed: int) -> tuple[BlockSparse, Tensor]:
    """The slice, and a dense matrix ``[n, d]`` of the same shape."""
    generator = torch.Generator().manual_seed(seed)
    d, n = setting.shape.d, setting.shape.n
    dense = torch.randn(n, d, generator=generator) / d**0.5
    return make_slice(d, n, setting, dtype, generator), dense.to(dtype)


def measure(session: Session, case: Case) -> Iterator[Row]:
    v, dense = weights_of(case.setting, case.dtype, session.args.seed)
    weight = dense.t().contiguous() if case.transpose else dense  # [out, in]
    x = torch.randn(case.tokens, weight.shape[1]).to(case.dtype)
    share = stored_share(v)
    work = {
        "flops": 2.0 * case.tokens * share * v.rows * v.cols,
        "nbytes": v.nbytes() + (v.rows + v.cols) * case.tokens * x.element_size(),
        "stored_share": share,
    }

    def ours() -> Tensor:
        return functional.block_sparse_mm(x, v, case.transpose)

    race = session.race({"ours": ours, "dense": lambda: F.linear(x, weight)})
    e = share * race.ratio("dense")
    yield session.row(race, "dense", case.dtype, **work, goal=case.goal(), e=e)
    for rival in case.sparse_rivals:
        sparse = as_torch_sparse(v, rival)
        few = x[: max(1, case.tokens // 16)]
        expected = seconds_of(lambda few=few, sparse=sparse: sparse @ few.t(), 1) * case.tokens / len(few)
        if expected > SLOWEST_SPARSE_S:
            yield {"rival": rival, "skipped": f"one call would take {expected:.0f} s"}
            continue
        race = session.race({"ours": ours, rival: lambda sparse=sparse: (sparse @ x.t()).t()})
        goal = OVER_BSR if rival == "torch BSR" else None
        yield session.row(race, rival, case.dtype, **work, goal=goal)


def as_torch_sparse(v: BlockSparse, rival: str) -> Tensor:
    """``Vᵀ`` in torch's own format: torch multiplies a sparse matrix with a dense one, not the reverse."""
    transposed = v.to_dense().t()
    return transposed.to_sparse_csr() if rival == "torch CSR" else transposed.to_sparse_bsr(v.block[::-1])


def main() -> int:
    warnings.filterwarnings("ignore", "Sparse .* tensor support is in beta state")
    session = Session(__doc__)
    shapes = shapes_of(session.args.shapes, session.quick)
    for case in cases(shapes, session.quick):
        session.attempt(case.keys(), functools.partial(measure, session, case))
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
