"""allocate: thresholds over the scores of several groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fips_ext import Recipe
from fips_ext.budget import GroupShape, Plan, solve
from fips_ext.init import ScoreCurve, allocate

WIDTH, HIDDEN = 32, 64
SHAPE = GroupShape(WIDTH, HIDDEN, True, 1, element_size=4)


def plans_of(groups: int, ratio: float, base: str = "identity") -> list[Plan]:
    return [solve(Recipe(ratio=ratio, pattern="bitmap:16x16", base=base), SHAPE)] * groups


def random_scores(groups: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(groups, generator=generator).mul(3).exp()
    return [scale[g] * torch.randn(WIDTH, 3 * HIDDEN, generator=generator).square() for g in range(groups)]


@settings(deadline=None, max_examples=40)
@given(groups=st.integers(1, 6), ratio=st.floats(0.2, 0.95), seed=st.integers(0, 2**31))
def test_spends_the_budget_on_the_highest_prices(groups: int, ratio: float, seed: int) -> None:
    plans, scores = plans_of(groups, ratio), random_scores(groups, seed)
    least = [plan.least_count // 8 for plan in plans]
    found = allocate(plans, [ScoreCurve.of([s]) for s in scores], least, 0.1)
    total = sum(plan.count for plan in plans)
    counts = [plan.count for plan in found]
    assert total - groups <= sum(counts) <= total
    assert all(low <= count for low, count in zip(least, counts, strict=True))
    assert sum(p.nbytes for p in found) <= sum(p.nbytes for p in plans)
    # What is dropped anywhere is worth no more than what is kept anywhere else, up to the width of bins.
    ranked = [s.flatten().sort(descending=True).values.double() for s in scores]
    weights = [1 + float(r[c:].sum()) / 2 / 0.1 for r, c in zip(ranked, counts, strict=True)]
    kept = [
        float(r[c - 1]) * w for r, c, w, low in zip(ranked, counts, weights, least, strict=True) if c > low
    ]
    dropped = [float(r[c]) * w for r, c, w in zip(ranked, counts, weights, strict=True) if c < r.numel()]
    if kept and dropped:
        assert max(dropped) <= min(kept) * 2 ** (6 / 64)


def test_small_errors_count_as_they_are_and_large_ones_more() -> None:
    """Two groups, one of which is twice as costly for every unit: how unequally they share."""
    shares = []
    for size in (1e-6, 1e6):
        score = size * torch.linspace(1, 2, WIDTH * 3 * HIDDEN).view(WIDTH, -1)
        curves = [ScoreCurve.of([score]), ScoreCurve.of([1.5 * score])]
        cheap, costly = allocate(plans_of(2, 0.6), curves, [0, 0], 0.1)
        shares.append(cheap.count / costly.count)
    assert shares[0] < 0.8 * shares[1] < 0.8


def test_equal_groups_get_equal_shares() -> None:
    plans = plans_of(3, 0.5)
    curve = ScoreCurve.of(random_scores(1, 0))
    assert allocate(plans, [curve] * 3, [0] * 3) == plans


def test_a_group_without_scores_keeps_the_least() -> None:
    plans = plans_of(2, 0.5)
    curves = [ScoreCurve.of(random_scores(1, 0)), ScoreCurve.of([torch.zeros(WIDTH, 3 * HIDDEN)])]
    found = allocate(plans, curves, [100, 100])
    assert found[1].count == pytest.approx(100, abs=1) or found[0].count == WIDTH * 3 * HIDDEN
    assert sum(plan.count for plan in found) <= 2 * plans[0].count


def test_extreme_scores_are_counted() -> None:
    scores = torch.tensor([0.0, 1e-45, 1e-38, 1.0, 3e38])
    assert int(ScoreCurve.of([scores]).counts.sum()) == 5


def test_a_curve_knows_what_is_dropped() -> None:
    scores = random_scores(1, 3)[0]
    curve = ScoreCurve.of([scores])
    ranked = scores.flatten().sort(descending=True).values.double()
    for count in (0, 1, 1000, ranked.numel() - 1, ranked.numel()):
        assert curve.dropped(count) == pytest.approx(float(ranked[count:].sum()), rel=0.02, abs=1e-9)
