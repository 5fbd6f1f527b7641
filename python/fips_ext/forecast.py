"""What a compression will store, before any data is seen."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from . import budget
from ._groups import group_mlps, select, shape_of
from .errors import BudgetError
from .init import unit_scores
from .nn.base import base_label
from .recipe import Recipe
from .surgery import DenseMLP, find_mlps
from .train import check_weights, weight_problems


@dataclasses.dataclass(frozen=True)
class GroupForecast:
    """One group over one kind of base.

    Attributes:
        layers: names of its MLPs.
        base: ``U<rank>``, ``I`` or both.
        density: stored values over slots of V.
        dense_bytes, nbytes: of the group, before and at most after.
        macs_ratio: multiply-adds per token over dense.
        weight_error: the mean of ``‖W − U V‖² / ‖W‖²`` over its matrices, for the best mask of a data-free
            start whose base is not rotated yet. What calibration makes of the same bytes is better: this
            compares, it does not predict.
    """

    layers: list[str]
    base: str
    density: float
    dense_bytes: int
    nbytes: int
    macs_ratio: float
    weight_error: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@torch.no_grad()
def forecast(model: nn.Module, recipe: Recipe) -> list[GroupForecast]:
    """What :func:`fips_ext.compress` would store, per group and per kind of base that the recipe allows.

    Every group is given the same ratio; ``ranking="model"`` moves bytes between them once it has data, and
    ``base="auto"`` then takes one of the two.

    Args:
        model: dense; not changed.

    Raises:
        SurgeryError, BudgetError, InvalidArgument, NumericalError: see :func:`fips_ext.compress`.
    """
    mlps = select(find_mlps(model), recipe)
    for mlp in mlps:
        check_weights(mlp)
    groups = group_mlps(mlps, recipe.group_size)
    return [found for group in groups for found in _of_group(group, recipe)]


def _of_group(group: list[DenseMLP], recipe: Recipe) -> list[GroupForecast]:
    shape = shape_of(group)
    plans = []
    for base in recipe.bases:
        try:
            plans.append(budget.solve(dataclasses.replace(recipe, base=base), shape))
        except BudgetError:
            if len(recipe.bases) == 1:
                raise
    if not plans:
        budget.solve(recipe, shape)  # says what the least is
    problems = [weight_problems(mlp) for mlp in group]
    return [
        GroupForecast(
            layers=[mlp.name for mlp in group],
            base=base_label(plan.rank, plan.identity),
            density=plan.density,
            dense_bytes=shape.dense_bytes,
            nbytes=plan.nbytes,
            macs_ratio=plan.macs / shape.dense_macs,
            weight_error=_weight_error(problems, plan, dataclasses.replace(recipe, init="svd")),
        )
        for plan in plans
    ]


def _weight_error(problems: list, plan: budget.Plan, recipe: Recipe) -> float:
    scores = torch.cat([score.flatten() for score in unit_scores(problems, plan, recipe)])
    kept = scores.topk(min(plan.count, scores.numel()), sorted=False).values.double().sum()
    # Every matrix is an error of 1 when nothing of it is kept.
    return max(0.0, 1 - float(kept) / plan.shape.slices)
