"""The whole MLP on a CPU against the dense MLP and against its own chain with V filled up with zeros.

    python benchmarks/bench_shared_mlp.py --quick --json mlp.json

``a`` is the rank over the width, r / d. Every row against ``dense`` also has ``best_ratio``, the ratio over
the faster of the two rivals in each round; the last row is the worst of them, for which the planner answers.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence

import torch
from cpu_shapes import (
    DTYPES,
    QUICK_TOKENS,
    TOKENS,
    DenseMlp,
    Setting,
    Shape,
    SharedMlp,
    ZeroFilledMlp,
    make_mlps,
    settings,
    shapes_of,
)
from cpu_timing import Goal, Row, Session, dtype_name, judge

PLANNER = Goal("G17", "best_ratio", 0.97)


@dataclasses.dataclass(frozen=True)
class Case:
    setting: Setting
    dtype: torch.dtype
    rank_share: float
    tokens: int

    @property
    def rank(self) -> int:
        return int(self.setting.shape.d * self.rank_share)

    def keys(self) -> Row:
        return {
            "case": f"{self.setting.shape.name} a={self.rank_share:g}",
            "dtype": dtype_name(self.dtype),
            "T": self.tokens,
            "a": self.rank_share,
            "r": self.rank,
            "gated": self.setting.shape.gated,
            **self.setting.keys(),
        }


def cases(shapes: Sequence[Shape], quick: bool) -> Iterator[Case]:
    for rank_share in (0.5,) if quick else (0.5, 1.0):
        for setting in settings(shapes, quick):
            for dtype in DTYPES:
                for tokens in QUICK_TOKENS if quick else TOKENS:
                    yield Case(setting, dtype, rank_share, tokens)
    if not quick:
        for tokens in (197, 1576):
            yield Case(Setting(shapes[0]), torch.float16, 0.5, tokens)


@functools.lru_cache(maxsize=1)  # neighbouring cases share their weights
def weights_of(
    setting: Setting, rank: int, dtype: torch.dtype, seed: int
) -> tuple[SharedMlp, DenseMlp, ZeroFilledMlp]:
    shared, dense = make_mlps(setting, rank, dtype, torch.Generator().manual_seed(seed))
    return shared, dense, ZeroFilledMlp(shared)


def measure(session: Session, case: Case) -> Iterator[Row]:
    shared, dense, filled = weights_of(case.setting, case.rank, case.dtype, session.args.seed)
    x = torch.randn(case.tokens, case.setting.shape.d).to(case.dtype)
    race = session.race(
        {"ours": lambda: shared(x), "dense": lambda: dense(x), "zero-filled": lambda: filled(x)}
    )
    work = {"flops": shared.flops(case.tokens), "nbytes": shared.nbytes() + 2 * x.nbytes}
    forms = ("dense", "zero-filled")
    best = {"best_ratio": race.ratio(*forms), "best_spread": race.spread(*forms)}
    yield session.row(race, "dense", case.dtype, **work, **best)
    yield session.row(race, "zero-filled", case.dtype, **work)


def worst_case(rows: Sequence[Row]) -> Row | None:
    """A summary row: the measured case with the lowest ratio over the best dense form."""
    measured = [row for row in rows if "best_ratio" in row]
    if not measured:
        return None
    worst = min(measured, key=lambda row: row["best_ratio"])
    summary = {
        "summary": True,
        "case": f"worst of the grid: {worst['case']}",
        "rival": "best dense form",
        "rival_s": worst["best_ratio"] * worst["ours_s"],
        "ratio": worst["best_ratio"],
        "spread": worst["best_spread"],
    }
    return worst | summary | judge(worst, PLANNER)


def main() -> int:
    session = Session(__doc__)
    shapes = shapes_of(session.args.shapes, session.quick)
    for case in cases(shapes, session.quick):
        session.attempt(case.keys(), functools.partial(measure, session, case))
    worst = worst_case(session.rows)
    if worst is not None:
        session.add(worst)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
