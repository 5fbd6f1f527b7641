"""Bytes and multiply-adds of a group of MLPs, and the solver that makes either meet a ratio.

What is counted is what a checkpoint stores: bases, values or codes and their scales, block index, masks and
biases, all floating values in one dtype (arXiv 2411.09816 counts ``d·r + nnz(V)`` values only and forgets the
rest).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

from .errors import BudgetError
from .layout import grid_shape
from .nn import SharedMLP
from .quantise import SCALE_DTYPE, Bits
from .recipe import Pattern, Recipe

_INDEX_BYTES = 4  # col_ptr and row_idx are int32

# Many sparse base vectors beat few dense ones at equal bytes, down to about this density of V.
_LEAST_DENSITY = 0.2
# A low-rank part beside the identity takes this share of the width.
_LOW_RANK_SHARE = 1 / 16


@dataclasses.dataclass(frozen=True)
class GroupShape:
    """The sizes of a group of equal MLPs.

    Attributes:
        width, hidden: ``d`` and ``n``.
        gated: three matrices per MLP instead of two.
        layers: MLPs in the group.
        biases: bias values of the whole group.
        element_size: bytes of one value, in the dense as in the compressed model.
    """

    width: int
    hidden: int
    gated: bool
    layers: int
    biases: int = 0
    element_size: int = 2

    @property
    def slices(self) -> int:
        """Matrices in the group."""
        return self.layers * (3 if self.gated else 2)

    @property
    def columns(self) -> int:
        """``C``: columns of the concatenated group."""
        return self.slices * self.hidden

    @property
    def dense_bytes(self) -> int:
        return (self.width * self.columns + self.biases) * self.element_size

    @property
    def dense_macs(self) -> int:
        """Multiply-adds per token of the dense group."""
        return self.width * self.columns


class Stored(NamedTuple):
    """What a plan stores beside its values: one term of :func:`plan_bytes` each."""

    base: int
    index: int
    biases: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a group spends its bytes.

    Attributes:
        shape: of the group.
        pattern: of its slices.
        rank: stored base vectors per base (0 with a bare identity).
        identity: whether the base reads ``[U, I]``.
        bases: stored bases: 1, or 2 with one per role, or 0.
        count: stored values (``bitmap``) or stored blocks (``block``, ``dense``) over all slices.
        nbytes: an upper bound of what is stored; reached when every bitmap block holds a value (and of codes
            of 4 bits an odd number).
        bits: of a code; None where values are stored.
    """

    shape: GroupShape
    pattern: Pattern
    rank: int
    identity: bool
    bases: int
    count: int
    nbytes: int
    bits: Bits | None = None

    @property
    def rows(self) -> int:
        """Rows of a slice: ``r``, plus ``d`` with the identity part."""
        return self.rank + (self.shape.width if self.identity else 0)

    @property
    def ratio(self) -> float:
        return self.nbytes / self.shape.dense_bytes

    @property
    def density(self) -> float:
        """Stored values (padding included) over the slots of all slices."""
        values = self.count * _unit_values(self.pattern)
        return values / max(1, self.rows * self.shape.columns)

    @property
    def macs(self) -> int:
        """Multiply-adds per token: the bases, twice in each layer, and every slot of a stored block."""
        pattern, shape = self.pattern, self.shape
        blocks = self.count
        if pattern.kind == "bitmap":
            blocks = shape.slices * math.prod(grid_shape(self.rows, shape.hidden, pattern.block))
        return _base_macs(shape, self.rank) + blocks * math.prod(pattern.block)

    def spent(self, budget: str) -> int:
        """What a budget in ``bytes`` or ``macs`` counts."""
        return self.nbytes if budget == "bytes" else self.macs

    @property
    def least_count(self) -> int:
        """The fewest units that leave no column of the grid empty on average."""
        return _least_count(self.pattern, self.shape, self.rows)

    def with_count(self, count: int) -> Plan:
        """The same plan with another number of stored units."""
        bits = _unit_bits(self.pattern, self.shape, self.bits)
        nbytes = self.nbytes - _whole_bytes(self.count * bits) + _whole_bytes(count * bits)
        return dataclasses.replace(self, count=count, nbytes=nbytes)


def solve(recipe: Recipe, shape: GroupShape, allowed: int | None = None) -> Plan:
    """The plan of a group that meets ``recipe.ratio`` exactly or below, never above.

    With ``base="auto"`` the plan is that of the first of ``recipe.bases`` that can meet it.

    Args:
        allowed: bytes, or multiply-adds, see ``recipe.budget``, to meet instead.

    An unset rank becomes: for ``dense`` the largest that fits; for ``shared`` the largest up to ``d`` that
    leaves V a density of 0.2; for ``both`` about ``d / 16``. Ranks are multiples of ``bk``, or ``d``.

    Raises:
        BudgetError: the ratio leaves less than one value (``block``: one block) per column of the grid; the
            message holds the smallest feasible ratio.
    """
    for base in recipe.bases[:-1]:
        with contextlib.suppress(BudgetError):
            return solve(dataclasses.replace(recipe, base=base), shape, allowed)
    recipe = dataclasses.replace(recipe, base=recipe.bases[-1])
    pattern = recipe.parsed_pattern
    dense = _dense(recipe, shape)
    asked = recipe.ratio if allowed is None else allowed / dense
    allowed = allowance(recipe, shape) if allowed is None else allowed
    plans = [_spend(recipe, shape, rank, allowed) for rank in _ranks(recipe, shape)]
    feasible = [plan for plan in plans if plan is not None]
    if not feasible:
        least = min(_least(recipe, shape, rank) for rank in _ranks(recipe, shape))
        smallest = math.ceil(least / dense * 1e4) / 1e4
        hint = "raise the ratio, the group size, or take a smaller rank"
        if smallest > 1:
            hint = "this pattern cannot save anything on MLPs this small or with this base; take another"
        raise BudgetError(
            f"ratio: got {asked:.4g} of the {recipe.budget}; the base, index and biases of {shape.layers} "
            f"MLPs of {shape.width}x{shape.hidden} with pattern {pattern} need at least {smallest:.4f}; "
            f"{hint}"
        )
    if pattern.kind == "dense":
        return feasible[-1]
    # Ranks increase, densities fall.
    roomy = [plan for plan in feasible if plan.density >= _LEAST_DENSITY]
    return roomy[-1] if roomy else feasible[0]


def allowance(recipe: Recipe, shape: GroupShape) -> int:
    """What ``recipe.ratio`` lets a group take, in the unit of ``recipe.budget``."""
    # 0.1972 of 40000 is 7888, though not in floating point.
    return math.floor(round(recipe.ratio * _dense(recipe, shape), 6))


def slice_bytes(
    rows: int,
    cols: int,
    pattern: Pattern,
    blocks: int,
    values: int,
    element_size: int,
    bits: Bits | None = None,
) -> int:
    """Bytes of one slice in a checkpoint, with ``blocks`` stored blocks and ``values`` stored values.

    Of the codes of 4 bits in a bitmap, ``values`` includes those that pad a block to whole bytes.
    """
    _, block_columns = grid_shape(rows, cols, pattern.block)
    mask = blocks * math.prod(pattern.block) // 8 if pattern.kind == "bitmap" else 0
    scales = blocks * _scale_bytes(pattern, bits)
    packed = _whole_bytes(values * (bits or 8 * element_size))
    return packed + (block_columns + 1 + blocks) * _INDEX_BYTES + mask + scales


def mlp_bytes(mlps: Iterable[SharedMLP]) -> int:
    """Stored bytes of MLPs; a base is counted with the layer that owns it."""
    return sum(tensor.numel() * tensor.element_size() for mlp in mlps for tensor in mlp.state_dict().values())


def mlp_macs(mlp: SharedMLP) -> int:
    """Multiply-adds per token that one MLP needs: both bases and every slot of a stored block.

    A zero inside a bitmap block is multiplied like any other value, and the base of a group once in each of
    its layers: neither saves arithmetic.
    """
    out = mlp.base if mlp.base_out is None else mlp.base_out
    slots = sum(f.row_idx.numel() * math.prod(f.block) for f in mlp.factors().values())
    return mlp.base.weight.numel() + out.weight.numel() + slots


def _ranks(recipe: Recipe, shape: GroupShape) -> list[int]:
    """The ranks to choose from, increasing."""
    if recipe.base == "identity":
        return [0]
    if recipe.rank is not None:
        return [recipe.rank]
    edge = recipe.parsed_pattern.block[0]
    steps = [*range(edge, shape.width, edge), shape.width]
    if recipe.base == "both" and recipe.parsed_pattern.kind != "dense":
        # Steps below the share as well, for the case that it does not fit.
        return [r for r in steps if r <= max(edge, _LOW_RANK_SHARE * shape.width)] or steps[:1]
    return steps


def _fixed(recipe: Recipe, shape: GroupShape, rank: int) -> Stored:
    """Bytes that do not depend on the number of stored values (``bitmap``: with every block stored)."""
    pattern = recipe.parsed_pattern
    rows = _rows(recipe, shape, rank)
    stored = math.prod(grid_shape(rows, shape.hidden, pattern.block)) if pattern.kind == "bitmap" else 0
    padding = stored if recipe.bits == 4 else 0
    index = shape.slices * slice_bytes(
        rows, shape.hidden, pattern, stored, padding, shape.element_size, recipe.bits
    )
    base = _bases(recipe) * shape.width * rank * shape.element_size
    return Stored(base, index, shape.biases * shape.element_size)


def _dense(recipe: Recipe, shape: GroupShape) -> int:
    return shape.dense_bytes if recipe.budget == "bytes" else shape.dense_macs


def _spend(recipe: Recipe, shape: GroupShape, rank: int, allowed: int) -> Plan | None:
    """The plan of one rank, or None when what is allowed is below the least it needs."""
    pattern = recipe.parsed_pattern
    if allowed < _least(recipe, shape, rank):
        return None
    unit = _unit_bits(pattern, shape, recipe.bits)
    fixed = sum(_fixed(recipe, shape, rank))
    if recipe.budget == "bytes":
        count = (allowed - fixed) * 8 // unit
    else:
        count = (allowed - _base_macs(shape, rank)) // math.prod(pattern.block)
    count = min(count, _most(recipe, shape, rank))
    nbytes = fixed + _whole_bytes(count * unit)
    identity = recipe.base != "shared"
    return Plan(shape, pattern, rank, identity, _bases(recipe), count, nbytes, recipe.bits)


def _least(recipe: Recipe, shape: GroupShape, rank: int) -> int:
    """What the sparsest plan takes that is not degenerate; ``dense`` has no choice."""
    least = _least_count(recipe.parsed_pattern, shape, _rows(recipe, shape, rank))
    if recipe.budget == "macs":
        return _base_macs(shape, rank) + least * math.prod(recipe.parsed_pattern.block)
    unit = _unit_bits(recipe.parsed_pattern, shape, recipe.bits)
    return sum(_fixed(recipe, shape, rank)) + _whole_bytes(least * unit)


def _least_count(pattern: Pattern, shape: GroupShape, rows: int) -> int:
    block_rows, block_columns = grid_shape(rows, shape.hidden, pattern.block)
    return {
        "bitmap": shape.columns,
        "block": shape.slices * block_columns,
        "dense": shape.slices * block_rows * block_columns,
    }[pattern.kind]


def _most(recipe: Recipe, shape: GroupShape, rank: int) -> int:
    """Stored units at density 1."""
    pattern = recipe.parsed_pattern
    rows = _rows(recipe, shape, rank)
    if pattern.kind == "bitmap":
        return rows * shape.columns
    return shape.slices * math.prod(grid_shape(rows, shape.hidden, pattern.block))


def _rows(recipe: Recipe, shape: GroupShape, rank: int) -> int:
    return rank + (0 if recipe.base == "shared" else shape.width)


def _bases(recipe: Recipe) -> int:
    if recipe.base == "identity":
        return 0
    return 2 if recipe.per_role else 1


def _base_macs(shape: GroupShape, rank: int) -> int:
    """Of ``x U`` and ``w Uᵀ``, in every layer."""
    return 2 * shape.layers * shape.width * rank


def _unit_values(pattern: Pattern) -> int:
    return 1 if pattern.kind == "bitmap" else math.prod(pattern.block)


def _unit_bits(pattern: Pattern, shape: GroupShape, bits: Bits | None) -> int:
    """Of one stored value (``bitmap``) or of one block with its scales and its ``row_idx`` entry."""
    rest = 0 if pattern.kind == "bitmap" else _INDEX_BYTES + _scale_bytes(pattern, bits)
    return _unit_values(pattern) * (bits or 8 * shape.element_size) + 8 * rest


def _scale_bytes(pattern: Pattern, bits: Bits | None) -> int:
    """Of one block."""
    return 0 if bits is None else pattern.block[1] * SCALE_DTYPE.itemsize


def _whole_bytes(bits: int) -> int:
    return -(-bits // 8)
