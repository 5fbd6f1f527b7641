"""Times the two sides of every threshold of the GPU's heuristics; tuning_table.py makes the header of it.

    python benchmarks/tune.py --out benchmarks/results/<gpu>/tuning.json

Each way is made to run through the ops alone. Our kernels: a slice gets empty block rows until its density is
far below any threshold, which changes neither the stored blocks nor the products of them. The dense way: a
slice that stores every block, which also pays for filling it up. Where the number of tokens decides instead,
the dense way is the product of a dense matrix plus the filling, measured as a difference. A threshold on
tokens or tiles can therefore move by one step a run; run again after a build with the new header.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from gpu_shapes import TINY, Pattern, make_slice
from gpu_timing import Bench
from race import Row
from tuning_table import LOWEST_DENSITY, Tuning, present_tuning

from fips_ext import BlockSparse, functional

TOKENS = 4096
ROWS, COLS = 2048, 8192
BLOCK = (64, 128)
FILL_TOKENS = 512  # well above any threshold on tokens that a table starts with; see fill_tokens
FORCED_DENSITY = 0.8 * LOWEST_DENSITY
TILE_TOKENS, TALL = 1024, 128


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes of the products; a dry run has small ones."""

    rows: int
    cols: int
    tokens: int
    block: tuple[int, int]

    @classmethod
    def of(cls, bench: Bench) -> Problem:
        if bench.dry_run:
            return cls(TINY["d"], TINY["n"], TINY["tokens"], (16, 16))
        return cls(ROWS, COLS, TOKENS, BLOCK)

    def slice(self, bench: Bench, density: float, encoding: str = "block") -> BlockSparse:
        pattern = Pattern(density, self.block, encoding)
        return make_slice(self.rows, self.cols, pattern, torch.bfloat16, bench.device)


def with_empty_rows(v: BlockSparse) -> BlockSparse:
    """The same stored blocks in a slice of so many rows that their density is FORCED_DENSITY at most."""
    bk, bn = v.block
    rows = -(-int(v.num_blocks * bk * bn / (FORCED_DENSITY * v.cols)) // bk) * bk
    return BlockSparse.from_index(max(rows, v.rows), v.cols, v.block, v.values, v.col_ptr, v.row_idx)


def row(threshold: str, x: float, ours: float, other: float) -> Row:
    return {"threshold": threshold, "case": threshold, "x": x, "ours_s": ours, "other_s": other}


# -- densities, at many tokens -------------------------------------------------------------------------------


def mm_density(bench: Bench, problem: Problem, density: float) -> Iterator[Row]:
    sparse = with_empty_rows(problem.slice(bench, density))
    full = problem.slice(bench, 1.0)
    wide, x = (bench.randn(problem.tokens, v.rows) for v in (sparse, full))
    race = bench.race(
        {
            "ours": lambda: functional.block_sparse_mm(wide, sparse),
            "dense": lambda: functional.block_sparse_mm(x, full),
        }
    )
    yield row("mm", density, race.seconds(), race.seconds("dense"))


def sddmm_density(bench: Bench, problem: Problem, density: float) -> Iterator[Row]:
    sparse = with_empty_rows(problem.slice(bench, density))
    full = problem.slice(bench, 1.0)
    wide, a = (bench.randn(problem.tokens, v.rows) for v in (sparse, full))
    b = bench.randn(problem.tokens, problem.cols)
    race = bench.race(
        {
            "ours": lambda: functional.block_sparse_sddmm(wide, b, sparse),
            "dense": lambda: functional.block_sparse_sddmm(a, b, full),
        }
    )
    yield row("sddmm", density, race.seconds(), race.seconds("dense"))


# -- tokens, with every block stored -------------------------------------------------------------------------


def linear_seconds(bench: Bench, problem: Problem, tokens: int) -> float:
    """The product with a filled matrix; it was just written, so it may be in the L2."""
    weight = bench.randn(problem.cols, problem.rows)
    x = bench.randn(tokens, problem.rows)
    return bench.race({"ours": lambda: F.linear(x, weight)}).seconds()


def fill_tokens(present: Tuning) -> int:
    """Tokens for which the ops fill up: below a present threshold stored blocks would be timed instead."""
    return max(FILL_TOKENS, present.dense_tokens, present.bitmap_dense_tokens)


def filling_seconds(bench: Bench, problem: Problem, full: BlockSparse, tokens: int) -> float:
    x = bench.randn(tokens, problem.rows)
    whole = bench.race({"ours": lambda: functional.block_sparse_mm(x, full)}, flush=True).seconds()
    return max(0.0, whole - linear_seconds(bench, problem, tokens))


def token_sweep(
    bench: Bench,
    problem: Problem,
    kind: str,
    full: BlockSparse,
    ours: BlockSparse,
    counts: Sequence[int],
    present: Tuning,
) -> Iterator[Row]:
    filling = filling_seconds(bench, problem, full, fill_tokens(present))
    for tokens in counts:
        x = bench.randn(tokens, ours.rows)
        seconds = bench.race(
            {"ours": functools.partial(functional.block_sparse_mm, x, ours)}, flush=True
        ).seconds()
        yield row(kind, tokens, seconds, filling + linear_seconds(bench, problem, tokens))


def dense_tokens(bench: Bench, problem: Problem, present: Tuning) -> Iterator[Row]:
    full = problem.slice(bench, 1.0)
    counts = (8, 16, 32, 64, 128, 256, 512)
    yield from token_sweep(bench, problem, "tokens", full, with_empty_rows(full), counts, present)


def bitmap_tokens(bench: Bench, problem: Problem, present: Tuning) -> Iterator[Row]:
    """Below the present threshold only: from there on the ops fill a bitmap up."""
    v = problem.slice(bench, 0.5, "bitmap")
    last = present.bitmap_dense_tokens - 1
    counts = sorted({max(1, last // 4), max(1, last // 2), max(1, last)})
    yield from token_sweep(bench, problem, "bitmap", v, v, counts, present)


# -- token tiles ---------------------------------------------------------------------------------------------


def token_tiles(bench: Bench, problem: Problem, present: Tuning) -> Iterator[Row]:
    """Output blocks of 32 columns, which every GPU runs through the same kernel, fewer and more of them."""
    multiprocessors = bench.machine.get("multiprocessors", 2)
    tokens = TINY["tokens"] if bench.dry_run else TILE_TOKENS
    tiles = -(-tokens // TALL)
    edge = max(1, int(present.tiles_per_sm * multiprocessors / tiles))

    def seconds_per_block(out_blocks: int) -> float:
        pattern = Pattern(0.25, (64, 32))
        v = make_slice(problem.rows, 32 * out_blocks, pattern, torch.bfloat16, bench.device)
        x = bench.randn(tokens, problem.rows)
        race = bench.race({"ours": lambda: functional.block_sparse_mm(x, v)})
        return race.seconds() / out_blocks

    low = min(seconds_per_block(count) for count in {edge, max(1, edge - 1)})
    for factor in (1.1, 1.5, 2, 3, 4, 6):
        blocks = max(edge + 1, round(factor * edge))
        yield row("tiles", round(blocks * tiles / multiprocessors, 2), seconds_per_block(blocks), low)


def parts(bench: Bench, present: Tuning) -> Iterator[tuple[str, Callable[[], Iterator[Row]]]]:
    problem = Problem.of(bench)
    for density in (0.25, 0.5, 0.65, 0.8, 0.95):
        yield f"mm p={density}", functools.partial(mm_density, bench, problem, density)
    for density in (0.15, 0.25, 0.35, 0.5, 0.7):
        yield f"sddmm p={density}", functools.partial(sddmm_density, bench, problem, density)
    yield "tokens", functools.partial(dense_tokens, bench, problem, present)
    yield "bitmap", functools.partial(bitmap_tokens, bench, problem, present)
    yield "tiles", functools.partial(token_tiles, bench, problem, present)


def main(argv: Sequence[str] | None = None) -> int:
    bench = Bench(__doc__, "tuning", 30.0, argv)
    present = present_tuning(bench.machine["capability"])
    bench.extra["present"] = dataclasses.asdict(present)
    for name, measure in parts(bench, present):
        bench.attempt({"case": name}, measure)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
