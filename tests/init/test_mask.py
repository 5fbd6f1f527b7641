"""Saliency is the exact error of dropping an entry; selection is exact and global."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fips_ext.init import SliceProblem
from fips_ext.init.mask import base_energy, largest, saliency, select, select_per_output
from fips_ext.layout import to_blocks
from fips_ext.recipe import Pattern

from .problems import random_metric, random_slice


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("identity", [False, True])
def test_saliency_is_the_error_of_dropping_one_entry(metric: bool, identity: bool) -> None:
    base, v = torch.randn(6, 3), torch.randn(9 if identity else 3, 8)
    full = torch.cat([base, torch.eye(6)], 1) if identity else base
    problem = SliceProblem(full @ v, random_metric(6) if metric else None, torch.rand(8))
    scores = saliency(v, base_energy(problem, base, identity), problem.columns)
    for k, j in ((0, 0), (2, 7), (v.shape[0] - 1, 3)):
        dropped = v.clone()
        dropped[k, j] = 0
        torch.testing.assert_close(float(scores[k, j]), problem.error(full @ dropped), rtol=1e-3, atol=1e-8)


_SCORES = st.one_of(
    st.integers(0, 4).map(float), st.sampled_from([-0.0, 1e-45, 3e38, math.inf]), st.floats(0, 1, width=32)
)


@given(st.lists(_SCORES, min_size=1, max_size=60), st.integers(0, 60))
def test_largest_keeps_exactly_as_many_and_the_largest(values: list[float], count: int) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    count = min(count, len(values))
    parts = list(scores.split(7))
    kept = torch.cat(largest(parts, count))
    assert int(kept.sum()) == count
    order = scores.argsort(descending=True, stable=True)  # among equals the first ones win
    assert set(kept.nonzero().flatten().tolist()) == set(order[:count].tolist())


def test_blocks_are_ranked_over_all_slices_by_their_sum() -> None:
    pattern = Pattern.parse("block:16x32")
    scores = [torch.rand(32, 70), 10 * torch.rand(32, 70)]
    masks = select(scores, 4, pattern)
    assert not masks[0].any()
    sums = to_blocks(scores[1], pattern.block).sum((-2, -1)).flatten()
    kept = to_blocks(masks[1], pattern.block).any(-1).any(-1).flatten()
    assert set(kept.nonzero().flatten().tolist()) == set(sums.topk(4).indices.tolist())


def test_bitmap_keeps_single_values_over_all_slices() -> None:
    scores = [random_slice(5, 7).weight.square() for _ in range(3)]
    masks = select(scores, 11, Pattern.parse("bitmap"))
    flat, kept = torch.cat([s.flatten() for s in scores]), torch.cat([m.flatten() for m in masks])
    assert set(kept.nonzero().flatten().tolist()) == set(flat.topk(11).indices.tolist())


@pytest.mark.parametrize(
    ("rows", "cols", "count", "axis"), [(6, 9, 30, 0), (6, 9, 30, 1), (5, 7, 3, 1), (4, 4, 16, 0)]
)
def test_per_output_keeps_as_many_of_each(rows: int, cols: int, count: int, axis: int) -> None:
    score = torch.rand(rows, cols, generator=torch.Generator().manual_seed(0))
    mask = select_per_output(score, count, axis)
    assert int(mask.sum()) == count
    kept = mask.sum(1 - axis)
    assert int(kept.max() - kept.min()) <= 1
    for line, chosen in zip(score.movedim(axis, 0), mask.movedim(axis, 0), strict=True):
        if 0 < int(chosen.sum()) < chosen.numel():
            assert line[chosen].min() >= line[~chosen].max()
