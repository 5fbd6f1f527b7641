"""Compress the MLPs of a model: find, calibrate, factor, train, install."""

from __future__ import annotations

import dataclasses
import itertools
import resource
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from . import budget
from ._structure import describe
from .errors import InvalidArgument
from .init import Factors, ScoreCurve, SliceProblem, allocate, factorise, unit_scores
from .layout import BlockSparse
from .nn import SharedBase, SharedMLP, SparseFactor
from .recipe import Recipe
from .report import LayerReport, Report
from .surgery import DenseMLP, find_mlps
from .train import Calibration, calibrate, check_weights, distill, train_group, weight_problems

Progress = Callable[[int, int], None]
_DISTILL_WORK = 2  # steps of every group that one of the whole model takes as long as


def compress(
    model: nn.Module,
    recipe: Recipe,
    data: Iterable[Any] | Calibration | None,
    *,
    progress: Progress | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Report:
    """Replace every MLP of ``model`` by shared sparse factors, in place.

    Args:
        model: any model whose MLPs :func:`fips_ext.surgery.find_mlps` knows; its dtype and device are kept.
        recipe: the settings.
        data: model inputs to calibrate on: ids or pixel tensors, or dicts of keyword arguments; or what
            :func:`fips_ext.calibrate` made of them. May be None with ``init="svd"`` and ``steps=0``.
        progress: called with (done, total).
        compute_dtype: of the matrix products of calibration and training; default bfloat16 for a model in a
            half precision, else float32. Sums, decompositions and master weights are float32 or better. A
            ``Calibration`` brings its own.

    Returns:
        what was done and how large the error is.

    Raises:
        SurgeryError: no MLP was found.
        BudgetError: the ratio is too small for this model and pattern.
        InvalidArgument: too little calibration data, or a rank the model has no room for.
        NumericalError: NaN or Inf in weights, activations or the loss; nothing is replaced in that group.
    """
    start = time.perf_counter()
    mlps = find_mlps(model)
    for mlp in mlps:
        check_weights(mlp)
    groups = group_mlps(mlps, recipe.group_size)
    plans = [budget.solve(recipe, shape_of(group)) for group in groups]
    _check_rank(recipe, mlps)
    dense_bytes, dense_macs = _model_bytes(model), sum(p.shape.dense_macs for p in plans)
    if mlps[0].up.weight.is_cuda:
        torch.cuda.reset_peak_memory_stats(mlps[0].up.weight.device)

    needs_data = recipe.init == "whitened" or recipe.steps > 0 or recipe.distill_steps > 0
    if needs_data and data is None:
        raise InvalidArgument("data: None is allowed only with init='svd', steps=0 and distill_steps=0")
    meter = _Meter(progress, len(groups), recipe)
    owned = None
    if data is not None and not isinstance(data, Calibration):
        data = owned = calibrate(
            model,
            data,
            recipe.calibration_tokens,
            loss=recipe.needs_loss,
            keep_batches=recipe.distill_steps > 0,
            seed=recipe.seed,
            compute_dtype=compute_dtype,
            progress=meter.calibrated,
        )
    try:
        if data is not None:
            data.check(mlps, recipe.needs_loss, recipe.distill_steps > 0)
        starts = itertools.accumulate((len(group) for group in groups), initial=0)
        calibrated = [_Group(group, data, start) for group, start in zip(groups, starts, strict=False)]
        if recipe.effective_ranking == "model":
            plans = _allocate(calibrated, plans, recipe)
        layers: list[_Layer] = []
        for group, plan in zip(calibrated, plans, strict=True):
            layers += _compress_group(group, plan, recipe, meter)
        installed = [layer.shared for layer in layers]
        divergence = None
        if recipe.distill_steps > 0:
            divergence = distill(
                model,
                mlps,
                installed,
                data.batches,
                steps=recipe.distill_steps,
                learning_rate=recipe.distill_learning_rate,
                compute_dtype=data.compute_dtype,
                seed=recipe.seed,
                on_step=meter.distilled,
            )
            for mlp, weight in zip(installed, (dense.up.weight for dense in mlps), strict=True):
                mlp.to(weight.dtype)
    finally:
        if owned is not None:
            owned.close()

    mlp_dense, mlp_now = sum(p.shape.dense_bytes for p in plans), budget.mlp_bytes(installed)
    other_linear = describe(model)["block_linear_bytes"]
    return Report(
        layers=[layer.report() for layer in layers],
        mlp_ratio=mlp_now / mlp_dense,
        linear_ratio=(mlp_now + other_linear) / (mlp_dense + other_linear),
        model_ratio=_model_bytes(model) / dense_bytes,
        macs_ratio=sum(budget.mlp_macs(mlp) for mlp in installed) / dense_macs,
        divergence_before=divergence and divergence[0],
        divergence_after=divergence and divergence[1],
        calibration_tokens=0 if data is None else data.tokens,
        seconds=time.perf_counter() - start,
        peak_memory=_peak_memory(mlps[0].up.weight.device),
    )


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
        slices = {
            role: SparseFactor(
                BlockSparse.from_dense(v, plan.pattern.block, plan.pattern.encoding, masks[role])
            )
            for role, v in values.items()
        }
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


@dataclasses.dataclass
class _Group:
    """Dense MLPs that will share bases, from number ``first`` of the calibrated ones."""

    mlps: list[DenseMLP]
    calibration: Calibration | None
    first: int

    def problems(self, recipe: Recipe) -> list[dict[str, SliceProblem]]:
        """What the initialiser minimises, per layer."""
        if self.calibration is None or recipe.init == "svd":
            return [weight_problems(mlp) for mlp in self.mlps]
        numbered = enumerate(self.mlps, self.first)
        return [self.calibration.problems(i, mlp, recipe.sensitivity) for i, mlp in numbered]


@dataclasses.dataclass
class _Layer:
    """One compressed MLP; errors as in :class:`LayerReport`."""

    dense: DenseMLP
    shared: SharedMLP
    before: float | None
    after: float | None
    seconds: float

    def report(self) -> LayerReport:
        dense = sum(parameter.nbytes for m in self.dense.linears().values() for parameter in m.parameters())
        now = budget.mlp_bytes([self.shared])
        return LayerReport(self.dense.name, dense, now, self.before, self.after, self.seconds)


def _allocate(groups: list[_Group], plans: list[budget.Plan], recipe: Recipe) -> list[budget.Plan]:
    """Plans of the same total, with what each group stores decided by scores over the whole model."""
    curves = [
        ScoreCurve.of(unit_scores(group.problems(recipe), plan, recipe))
        for group, plan in zip(groups, plans, strict=True)
    ]
    return allocate(plans, curves, [plan.least_count for plan in plans])


def _compress_group(group: _Group, plan: budget.Plan, recipe: Recipe, meter: _Meter) -> list[_Layer]:
    start = time.perf_counter()
    weight = group.mlps[0].up.weight
    shared = build(group.mlps, factorise(group.problems(recipe), plan, recipe), plan)
    meter.advance()
    before = after = [None] * len(shared)
    if group.calibration is not None:
        data = [group.calibration.layer_data(group.first + i) for i in range(len(shared))]
        dtype = group.calibration.compute_dtype
        before, after = train_group(shared, data, recipe, dtype, meter.advance)
    for dense, mlp in zip(group.mlps, shared, strict=True):
        # Master weights, where another stage follows.
        dense.install(mlp.to(weight.device, torch.float32 if recipe.distill_steps else weight.dtype))
    seconds = (time.perf_counter() - start) / len(shared)
    return [_Layer(*parts, seconds) for parts in zip(group.mlps, shared, before, after, strict=True)]


class _Meter:
    """Progress in optimiser steps: a group's initialisation counts as one, calibration as a fifth of all."""

    def __init__(self, progress: Progress | None, groups: int, recipe: Recipe) -> None:
        self._progress = progress
        self._distill_work = _DISTILL_WORK * groups
        work = groups * (recipe.steps + 1) + self._distill_work * recipe.distill_steps
        self._calibration = max(1, work // 4)
        self._total = self._calibration + work
        self._done = self._calibration

    def calibrated(self, found: int, needed: int) -> None:
        if self._progress is not None:
            self._progress(self._calibration * found // max(1, needed), self._total)

    def distilled(self) -> None:
        self.advance(self._distill_work)

    def advance(self, work: int = 1) -> None:
        self._done += work
        if self._progress is not None:
            self._progress(self._done, self._total)


def _check_rank(recipe: Recipe, mlps: list[DenseMLP]) -> None:
    narrowest = min(mlp.width for mlp in mlps)
    if recipe.base != "identity" and recipe.rank is not None and recipe.rank > narrowest:
        raise InvalidArgument(
            f"rank: got {recipe.rank}; the narrowest MLP has width {narrowest}, and a base of more vectors "
            "is not supported; lower it, or leave it to the budget solver"
        )


def _model_bytes(model: nn.Module) -> int:
    """Bytes of every tensor a checkpoint of ``model`` stores, tied ones once."""
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
