"""The whole MLP on a CPU against the dense MLP and against its own chain with V filled up with zeros.

    python benchmarks/bench_shared_mlp.py --quick --json mlp.json

``a`` is the rank over the width, r / d. Every row against ``dense`` also has ``best_ratio``, the ratio over
the faster of the two rivals in each round. ``cached`` rows are those of a module that may keep dense copies
(``fips_ext.nn.cache_dense``), where it would. The last two rows are the worst of ``best_ratio`` without such
copies, and with them: for these the planner answers.
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
from cpu_timing import Goal, Session, judge
from race import Row, dtype_name

from fips_ext import nn
from fips_ext.nn.dense_cache import MIN_TOKENS

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
    ranks = [(0.5, setting) for setting in settings(shapes, quick)]
    if not quick:
        ranks += [(1.0, setting) for setting in settings(shapes, quick=True)]
    for rank_share, setting in ranks:
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
    yield session.row(race, "dense", case.dtype, **work, **best, cached=False)
    yield session.row(race, "zero-filled", case.dtype, **work)

    module = shared.module()
    if case.tokens < MIN_TOKENS or nn.cache_dense(module) == 0:
        return
    race = session.race(
        {"ours": lambda: module(x), "dense": lambda: dense(x), "zero-filled": lambda: filled(x)}
    )
    best = {"best_ratio": race.ratio(*forms), "best_spread": race.spread(*forms)}
    name = f"{case.keys()['case']} cached"
    yield {**session.row(race, "dense", case.dtype, **work, **best, cached=True), "case": name}


def worst_case(rows: Sequence[Row], may_cache: bool) -> Row | None:
    """A summary row: the measured case with the lowest ratio over the best dense form."""
    cached = {case_of(row) for row in rows if row.get("cached")}
    measured = [
        row
        for row in rows
        if "best_ratio" in row and (row["cached"] or not may_cache or case_of(row) not in cached)
    ]
    if not may_cache:
        measured = [row for row in measured if not row["cached"]]
    if not measured:
        return None
    worst = min(measured, key=lambda row: row["best_ratio"])
    memory = "with dense copies" if may_cache else "no extra memory"
    summary = {
        "summary": True,
        "case": f"worst, {memory}: {worst['case'].removesuffix(' cached')}",
        "rival": "best dense form",
        "rival_s": worst["best_ratio"] * worst["ours_s"],
        "ratio": worst["best_ratio"],
        "spread": worst["best_spread"],
    }
    return worst | summary | judge(worst, PLANNER)


def case_of(row: Row) -> tuple:
    """What a row and its cached twin share."""
    name = str(row["case"]).removesuffix(" cached")
    return name, row["dtype"], row["T"], row["density"], row["block"], row["encoding"]


def main() -> int:
    session = Session(__doc__)
    shapes = shapes_of(session.args.shapes, session.quick)
    for case in cases(shapes, session.quick):
        session.attempt(case.keys(), functools.partial(measure, session, case))
    for worst in [worst_case(session.rows, may_cache) for may_cache in (False, True)]:
        if worst is not None:
            session.add(worst)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
