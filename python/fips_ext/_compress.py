"""Compress the MLPs of a model: find, calibrate, factor, train, install."""

from __future__ import annotations

import itertools
import resource
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import budget
from ._structure import describe
from .errors import InvalidArgument
from .init import Factors, factorise
from .layout import BlockSparse
from .nn import SharedBase, SharedMLP, SparseFactor
from .recipe import Recipe
from .report import LayerReport, Report
from .surgery import DenseMLP, find_mlps
from .train import (
    ActivationStore,
    LayerData,
    check_weights,
    collect,
    held_out_rows,
    observe,
    train_group,
    weight_problems,
)

Progress = Callable[[int, int], None]


def compress(
    model: nn.Module,
    recipe: Recipe,
    data: Iterable[Any] | None,
    *,
    progress: Progress | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Report:
    """Replace every MLP of ``model`` by shared sparse factors, in place.

    Args:
        model: any model whose MLPs :func:`fips_ext.surgery.find_mlps` knows; its dtype and device are kept.
        recipe: the settings.
        data: model inputs to calibrate on: ids or pixel tensors, or dicts of keyword arguments. May be None
            with ``init="svd"`` and ``steps=0``.
        progress: called with (done, total).
        compute_dtype: of the matrix products of calibration and training; default bfloat16 for a model in a
            half precision, else float32. Sums, decompositions and master weights are float32 or better.

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
    dtype = mlps[0].up.weight.dtype
    if compute_dtype is None:
        compute_dtype = torch.bfloat16 if dtype.itemsize == 2 else torch.float32
    if mlps[0].up.weight.is_cuda:
        torch.cuda.reset_peak_memory_stats(mlps[0].up.weight.device)

    needs_data = recipe.init == "whitened" or recipe.steps > 0
    if needs_data and data is None:
        raise InvalidArgument("data: None is allowed only with init='svd' and steps=0")
    meter = _Meter(progress, len(groups), recipe)
    tokens = recipe.calibration_tokens if data is not None else 0
    layers: list[LayerReport] = []
    installed: list[SharedMLP] = []
    with ActivationStore([mlp.width for mlp in mlps], tokens, dtype) as store:
        if data is not None:
            collect(model, mlps, data, store, meter.calibrated)
        inputs = iter(store.inputs)
        for group, plan in zip(groups, plans, strict=True):
            rows = list(itertools.islice(inputs, len(group)))
            group_layers, shared = _compress_group(group, plan, recipe, rows, compute_dtype, meter)
            layers += group_layers
            installed += shared

    mlp_dense, mlp_now = sum(p.shape.dense_bytes for p in plans), budget.mlp_bytes(installed)
    other_linear = describe(model)["block_linear_bytes"]
    return Report(
        layers=layers,
        mlp_ratio=mlp_now / mlp_dense,
        linear_ratio=(mlp_now + other_linear) / (mlp_dense + other_linear),
        model_ratio=_model_bytes(model) / dense_bytes,
        macs_ratio=sum(budget.mlp_macs(mlp) for mlp in installed) / dense_macs,
        calibration_tokens=tokens,
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
    for i, (dense, values, masks) in enumerate(zip(group, factors.values, factors.masks, strict=True)):
        slices = {
            role: SparseFactor(
                BlockSparse.from_dense(v, plan.pattern.block, plan.pattern.encoding, masks[role])
            )
            for role, v in values.items()
        }
        biases = {
            f"{role}_bias": linear.bias.detach().float().clone()
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


def _compress_group(
    group: list[DenseMLP],
    plan: budget.Plan,
    recipe: Recipe,
    inputs: list[Tensor],
    compute_dtype: torch.dtype,
    meter: _Meter,
) -> tuple[list[LayerReport], list[SharedMLP]]:
    start = time.perf_counter()
    device, dtype = group[0].up.weight.device, group[0].up.weight.dtype
    tokens = inputs[0].shape[0]
    layer_data: list[LayerData] = []
    problems = []
    held_out = held_out_rows(tokens) if tokens > 1 else tokens
    for mlp, x in zip(group, inputs, strict=True):
        if tokens == 0:
            problems.append(weight_problems(mlp))
            continue
        seen = observe(mlp, x, compute_dtype, held_out)
        problems.append(seen.problems if recipe.init == "whitened" else weight_problems(mlp))
        layer_data.append(LayerData(mlp.name, x, seen.targets, seen.weights, seen.power, held_out))
    shared = build(group, factorise(problems, plan, recipe), plan)
    del problems
    meter.advance()
    before = after = [None] * len(group)
    if layer_data:
        before, after = train_group(shared, layer_data, recipe, compute_dtype, meter.advance)
    for dense, mlp in zip(group, shared, strict=True):
        dense.install(mlp.to(device, dtype))
    seconds = (time.perf_counter() - start) / len(group)
    dense_bytes = plan.shape.dense_bytes // len(group)
    rows = [
        LayerReport(dense.name, dense_bytes, budget.mlp_bytes([mlp]), b, a, seconds)
        for dense, mlp, b, a in zip(group, shared, before, after, strict=True)
    ]
    return rows, shared


class _Meter:
    """Progress in optimiser steps: a group's initialisation counts as one, calibration as a fifth of all."""

    def __init__(self, progress: Progress | None, groups: int, recipe: Recipe) -> None:
        self._progress = progress
        work = groups * (recipe.steps + 1)
        self._calibration = max(1, work // 4)
        self._total = self._calibration + work
        self._done = self._calibration

    def calibrated(self, found: int, needed: int) -> None:
        if self._progress is not None:
            self._progress(self._calibration * found // max(1, needed), self._total)

    def advance(self) -> None:
        self._done += 1
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
