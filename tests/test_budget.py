"""Byte accounting and the solver."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fips_ext import Recipe
from fips_ext.budget import GroupShape, Plan, mlp_bytes, mlp_macs, slice_bytes, solve
from fips_ext.errors import BudgetError, InvalidArgument
from fips_ext.layout import BlockSparse
from fips_ext.nn import SharedBase, SharedMLP, SparseFactor
from fips_ext.recipe import Pattern

PATTERNS = ("bitmap", "bitmap:16x32", "block:16x16", "block:32x64", "dense:16x64", "dense:32x16")

shapes = st.builds(
    GroupShape,
    width=st.integers(17, 200),
    hidden=st.integers(17, 300),
    gated=st.booleans(),
    layers=st.integers(1, 6),
    biases=st.integers(0, 500),
    element_size=st.sampled_from((2, 4)),
)


def recipe_of(**fields) -> Recipe:
    if fields["pattern"].startswith("bitmap"):
        fields["budget"] = "bytes"
    return Recipe(**fields)


recipes = st.builds(
    recipe_of,
    budget=st.sampled_from(("bytes", "macs")),
    ratio=st.floats(0.05, 1),
    pattern=st.sampled_from(PATTERNS),
    rank=st.none() | st.integers(1, 16),
    base=st.sampled_from(("shared", "identity", "both")),
    per_role=st.booleans(),
    bits=st.sampled_from((None, 8, 4)),
)


def with_ratio(recipe: Recipe, ratio: float) -> Recipe:
    return Recipe(**{**recipe.to_dict(), "ratio": ratio})


def attempt(recipe: Recipe, shape: GroupShape) -> Plan:
    try:
        return solve(recipe, shape)
    except BudgetError:
        assume(False)
        raise


def dense(recipe: Recipe, shape: GroupShape) -> int:
    return shape.dense_bytes if recipe.budget == "bytes" else shape.dense_macs


def recount(plan: Plan) -> int:
    """The bytes of a plan, from the layout of each slice rather than from the solver's own sums."""
    shape, pattern = plan.shape, plan.pattern
    grid_rows = math.ceil(plan.rows / pattern.block[0])
    grid_columns = math.ceil(shape.hidden / pattern.block[1])
    blocks = grid_rows * grid_columns * shape.slices if pattern.kind == "bitmap" else plan.count
    values = plan.count if pattern.kind == "bitmap" else plan.count * math.prod(pattern.block)
    mask = blocks * math.prod(pattern.block) // 8 if pattern.kind == "bitmap" else 0
    base = plan.bases * shape.width * plan.rank
    index = 4 * (shape.slices * (grid_columns + 1) + blocks)
    scales = 0 if plan.bits is None else 2 * blocks * pattern.block[1]
    if plan.bits is None:
        stored = values * shape.element_size
    elif plan.bits == 4 and pattern.kind == "bitmap":  # a code may pad each block; slices end with bytes
        stored = math.ceil(values / 2) + shape.slices * math.ceil(blocks // shape.slices / 2)
    else:
        stored = values * plan.bits // 8
    return (base + shape.biases) * shape.element_size + stored + scales + index + mask


@given(recipes, shapes)
def test_never_above_the_budget_and_honest_about_it(recipe: Recipe, shape: GroupShape) -> None:
    plan = attempt(recipe, shape)
    assert plan.spent(recipe.budget) <= recipe.ratio * dense(recipe, shape)
    assert plan.nbytes == recount(plan)
    assert plan.rank <= shape.width
    assert plan.density > 0


@given(recipes, shapes)
def test_nothing_more_would_fit(recipe: Recipe, shape: GroupShape) -> None:
    plan = attempt(recipe, shape)
    if plan.pattern.kind == "dense":
        return
    unit = 1 if plan.pattern.kind == "bitmap" else math.prod(plan.pattern.block)
    grid_rows = math.ceil(plan.rows / plan.pattern.block[0])
    grid_columns = math.ceil(shape.hidden / plan.pattern.block[1])
    most = plan.rows * shape.columns if unit == 1 else grid_rows * grid_columns * shape.slices
    if recipe.budget == "macs":
        assert plan.count == most or plan.macs + unit > math.floor(recipe.ratio * shape.dense_macs)
        return
    step = math.ceil(unit * (plan.bits or 8 * shape.element_size) / 8) + (0 if unit == 1 else 4)
    if plan.bits is not None and unit > 1:
        step += 2 * plan.pattern.block[1]  # scales
    assert plan.count == most or plan.nbytes + step > math.floor(recipe.ratio * shape.dense_bytes)


@given(recipes, shapes, st.floats(0.05, 1))
def test_monotone_in_the_ratio(recipe: Recipe, shape: GroupShape, other: float) -> None:
    low, high = sorted((recipe.ratio, other))
    small = attempt(with_ratio(recipe, low), shape)
    large = solve(with_ratio(recipe, high), shape)
    assert small.rank <= large.rank
    if small.rank == large.rank:
        assert small.count <= large.count
        assert small.nbytes <= large.nbytes
        assert small.macs <= large.macs


@given(recipes, shapes)
def test_the_smallest_feasible_ratio_is_named_and_feasible(recipe: Recipe, shape: GroupShape) -> None:
    try:
        solve(with_ratio(recipe, 1e-9), shape)
    except BudgetError as error:
        smallest = float(str(error).split("need at least ")[1].split(";")[0])
    else:
        pytest.fail("a ratio of 1e-9 cannot be feasible")
    if smallest <= 1:
        solve(with_ratio(recipe, smallest), shape)
    else:
        with pytest.raises(BudgetError, match="take another"):
            solve(with_ratio(recipe, 1.0), shape)


def test_dense_chooses_the_largest_rank() -> None:
    shape = GroupShape(width=128, hidden=512, gated=True, layers=2)
    plan = solve(Recipe(ratio=0.5, pattern="dense:16x64", per_role=False), shape)
    # (d + C) r values of 2 bytes and a little index against d C.
    assert plan.rank == 48
    assert plan.density == 1


def test_a_bitmap_saves_no_multiply_adds() -> None:
    with pytest.raises(InvalidArgument, match="a bitmap multiplies its zeros"):
        Recipe(ratio=0.5, budget="macs")
    assert solve(Recipe(ratio=0.5, base="identity"), GroupShape(128, 512, True, 2)).macs == 128 * 512 * 6


def test_rank_falls_when_the_base_would_eat_the_budget() -> None:
    shape = GroupShape(width=256, hidden=256, gated=False, layers=1)
    plan = solve(Recipe(ratio=0.3, pattern="bitmap:16x64", base="shared"), shape)
    assert 0 < plan.rank < 256
    assert plan.density >= 0.2


def test_slice_bytes_equal_what_a_slice_stores() -> None:
    dense = torch.randn(70, 90).half()
    mask = torch.rand(70, 90) < 0.3
    for pattern in map(Pattern.parse, ("bitmap:16x32", "block:32x16")):
        packed = BlockSparse.from_dense(dense, pattern.block, pattern.encoding, mask)
        values = packed.values.numel()
        assert slice_bytes(70, 90, pattern, packed.num_blocks, values, 2) == packed.nbytes()
        for bits in (8, 4):
            codes = packed.quantised(bits)
            held = codes.values.numel() * 8 // bits
            assert slice_bytes(70, 90, pattern, codes.num_blocks, held, 2, bits) == codes.nbytes()


@pytest.mark.parametrize("per_role", [False, True])
def test_mlp_bytes_and_macs_by_hand(per_role: bool) -> None:
    d, n, rank = 32, 64, 16

    def factor() -> SparseFactor:
        return SparseFactor(BlockSparse.from_dense(torch.ones(rank, n), (16, 64), "bitmap"))

    bases = [SharedBase(torch.ones(d, rank)) for _ in range(2)]
    out = bases[1] if per_role else None
    first = SharedMLP(bases[0], factor(), factor(), base_out=out, up_bias=torch.zeros(n))
    second = SharedMLP(bases[0], factor(), factor(), base_out=out, owns_base=False)
    # Values, two column pointers, one row index, and a bit per slot.
    one_slice = rank * n * 4 + 2 * 4 + 4 + rank * n // 8
    base_bytes = d * rank * 4 * (2 if per_role else 1)
    assert mlp_bytes([first, second]) == 4 * one_slice + base_bytes + n * 4
    assert mlp_bytes([second]) == 2 * one_slice
    assert mlp_macs(first) == mlp_macs(second) == 2 * d * rank + 2 * rank * n
