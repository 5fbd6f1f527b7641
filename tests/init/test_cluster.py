"""Balanced assignment, and that planted blocks are found again."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fips_ext import Recipe
from fips_ext.budget import GroupShape, solve
from fips_ext.init import SliceProblem, factorise
from fips_ext.init.cluster import balanced_assignment


@settings(max_examples=40, deadline=None)
@given(
    capacities=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    constant=st.booleans(),
)
def test_fills_every_cluster(capacities: list[int], seed: int, constant: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    gains = torch.rand(sum(capacities), len(capacities), generator=generator)
    if constant:
        gains.fill_(0.5)
    found = balanced_assignment(gains, torch.tensor(capacities))
    assert torch.bincount(found, minlength=len(capacities)).tolist() == capacities


def test_gains_as_much_as_an_exact_solver() -> None:
    # Two clusters of three: the best is known by trying all.
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        gains = torch.rand(6, 2, generator=generator)
        found = balanced_assignment(gains, torch.tensor([3, 3]))
        total = gains.gather(1, found.unsqueeze(1)).sum()
        best = max(
            sum(gains[i, 0] if i in chosen else gains[i, 1] for i in range(6))
            for chosen in map(set, torch.combinations(torch.arange(6), 3).tolist())
        )
        torch.testing.assert_close(total, best)


def planted(hidden: int, seed: int) -> list[dict[str, SliceProblem]]:
    """Neurons of two kinds, in random order: each kind lives in its own half of the width."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for _ in range(2):
        kind = torch.arange(hidden)[torch.randperm(hidden, generator=generator)] < hidden // 2
        layer = {}
        for role in ("up", "down"):
            weight = torch.randn(32, hidden, generator=generator)
            weight[:16, kind] = 0
            weight[16:, ~kind] = 0
            layer[role] = SliceProblem(weight, None, torch.ones(hidden))
        layers.append(layer)
    return layers


def test_finds_planted_blocks() -> None:
    layers = planted(64, 0)
    recipe = Recipe(ratio=0.6, pattern="block:16x16", base="identity", sensitivity="output", refit=False)
    plan = solve(recipe, GroupShape(32, 64, False, 2))
    factors = factorise(layers, plan, recipe)
    for layer, values, order in zip(layers, factors.values, factors.orders, strict=True):
        assert sorted(order.tolist()) == list(range(64))
        for role, problem in layer.items():
            torch.testing.assert_close(values[role], problem.weight[:, order])
