"""Which MLPs are compressed, which of them share bases, and what becomes of each group."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools

from . import budget, memory
from .errors import InvalidArgument
from .finished_group import FinishedGroup
from .init import Factors
from .layout import BlockSparse
from .nn import SharedBase, SharedMLP, SparseFactor
from .nn.base import base_label
from .nn.factor import FloatValues
from .recipe import Recipe
from .report import LayerReport
from .surgery import DenseMLP


@dataclasses.dataclass
class Group:
    """Dense MLPs that share bases, and what becomes of them.

    Attributes:
        mlps: the dense ones.
        plan: how it spends its bytes.
        allowed: what it may spend, in the unit of ``Recipe.budget``.
        shared: the compressed ones, once initialised.
        before, after: errors as in :class:`LayerReport`, once trained.
        seconds: spent so far.
    """

    mlps: list[DenseMLP]
    plan: budget.Plan
    allowed: int
    shared: list[SharedMLP] = dataclasses.field(default_factory=list)
    before: list[float] | None = None
    after: list[float] | None = None
    seconds: float = 0.0

    @classmethod
    def of(cls, mlps: list[DenseMLP], recipe: Recipe) -> Group:
        shape = shape_of(mlps)
        return cls(mlps, budget.solve(recipe, shape), budget.allowance(recipe, shape))

    @property
    def names(self) -> list[str]:
        return [mlp.name for mlp in self.mlps]

    def finished(self) -> FinishedGroup:
        """What a journal keeps of it."""
        return FinishedGroup(self.names, self.shared, self.before, self.after, self.seconds)

    def take(self, group: FinishedGroup) -> None:
        """Become what a journal kept."""
        device = self.mlps[0].up.weight.device
        self.shared = [mlp.to(device) for mlp in group.mlps]
        for mlp in self.shared:
            memory.keep_module(mlp)
        memory.relax()
        self.before, self.after, self.seconds = group.before, group.after, group.seconds

    def round(self) -> list[tuple[SparseFactor, FloatValues]]:
        """Bring the factors to what is stored: codes, the dtype of the model; returns what undoes codes."""
        factors = [f for mlp in self.shared for f in mlp.factors().values() if f.rounding is not None]
        before = [(factor, factor.quantise()) for factor in factors]
        for mlp in self.shared:
            mlp.to(self.mlps[0].up.weight.dtype)
            memory.keep_module(mlp)
            memory.relax()
        return before

    def reports(self) -> list[LayerReport]:
        reports = []
        nothing = [None] * len(self.mlps)
        errors = zip(self.before or nothing, self.after or nothing, strict=True)
        for dense, shared, (before, after) in zip(self.mlps, self.shared, errors, strict=True):
            size = sum(p.nbytes for linear in dense.linears().values() for p in linear.parameters())
            seconds = self.seconds / len(self.mlps)
            reports.append(
                LayerReport(
                    dense.name,
                    size,
                    budget.mlp_bytes([shared]),
                    before,
                    after,
                    seconds,
                    base_label(shared.base.rank, shared.base.identity),
                )
            )
        return reports


def select(mlps: list[DenseMLP], recipe: Recipe) -> list[DenseMLP]:
    """Those that ``recipe.include`` and ``recipe.exclude`` leave; at least one."""
    names = [mlp.name for mlp in mlps]
    unknown = [g for g in (*(recipe.include or ()), *(recipe.exclude or ())) if not fnmatch.filter(names, g)]
    chosen = [mlp for mlp in mlps if recipe.selects(mlp.name)]
    if unknown or not chosen:
        what = f"{', '.join(map(repr, unknown))} is the name of no MLP" if unknown else "nothing is left"
        raise InvalidArgument(
            f"include, exclude: {what}; there are {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        )
    return chosen


def group_mlps(mlps: list[DenseMLP], size: int) -> list[list[DenseMLP]]:
    """Cut runs of MLPs of equal shape into groups of at most ``size``, as even as they can be."""

    def kind(mlp: DenseMLP) -> tuple:
        weight = mlp.up.weight
        return mlp.width, mlp.hidden, mlp.gate is not None, mlp.activation, weight.dtype, weight.device

    groups = []
    for _, run in itertools.groupby(mlps, kind):
        members = list(run)
        count = -(-len(members) // size)
        bounds = [len(members) * i // count for i in range(count + 1)]
        groups += [members[a:b] for a, b in itertools.pairwise(bounds)]
    return groups


def shape_of(group: list[DenseMLP]) -> budget.GroupShape:
    """The sizes that the budget of a group depends on."""
    first = group[0]
    biases = sum(
        linear.bias.numel() for mlp in group for linear in mlp.linears().values() if linear.bias is not None
    )
    return budget.GroupShape(
        first.width,
        first.hidden,
        first.gate is not None,
        len(group),
        biases,
        first.up.weight.element_size(),
    )


def build(group: list[DenseMLP], factors: Factors, plan: budget.Plan) -> list[SharedMLP]:
    """The modules of a factored group, float32; the first layer owns the bases."""
    bases = [SharedBase(base.clone(), factors.identity) for base in factors.bases]
    base_out = bases[1] if len(bases) == 2 else None
    mlps = []
    parts = zip(group, factors.values, factors.masks, factors.orders, strict=True)
    for i, (dense, values, masks, order) in enumerate(parts):
        slices = {}
        for role, v in values.items():
            layout = BlockSparse.from_dense(v, plan.pattern.block, plan.pattern.encoding, masks[role])
            slices[role] = SparseFactor(layout)
            memory.keep_module(slices[role])
            memory.relax()
        for role, scales in (factors.scales[i] if plan.bits is not None else {}).items():
            slices[role].round_to(plan.bits, scales)
        biases = {
            f"{role}_bias": linear.bias.detach().float()[... if role == "down" else order].clone()
            for role, linear in dense.linears().items()
            if linear.bias is not None
        }
        mlps.append(
            SharedMLP(
                bases[0],
                base_out=base_out,
                activation=dense.activation,
                owns_base=i == 0,
                **slices,
                **biases,
            )
        )
    return mlps
