"""Compress the MLPs of a model: find, calibrate, factor, train, install."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__, budget, distributed, memory
from ._groups import Group, build, group_mlps, select
from ._structure import describe
from .checkpoint import attach
from .errors import BudgetError, InvalidArgument
from .fingerprint import Fingerprint, of_model
from .finished_group import FinishedGroup
from .init import LAYER_SCALE, ScoreCurve, SliceProblem, allocate, factorise, unit_scores
from .journal import Journal
from .nn import SharedMLP, SparseFactor
from .nn.factor import FloatValues
from .recipe import Recipe
from .report import Report
from .surgery import DenseMLP, find_mlps
from .train import (
    Calibration,
    Divergence,
    LayerData,
    batches_for,
    calibrate,
    check_weights,
    distill,
    next_token_losses,
    product_dtype,
    train_group,
    weight_problems,
)

Progress = Callable[[int, int], None]
# To be taken in place of the base that was predicted to be the cheaper one, another must cost less by this
# share, beyond what chance may have done: what fits its calibration data closely flatters itself a little.
_BASE_MARGIN = 0.05
_STANDARD_ERRORS = 2
# Predicted costs do not see how masks and bases get on with each other; below this share they tell nothing.
_PREDICTED_MARGIN = 0.2
_DISTILL_WORK = 2  # steps of every group that one of the whole model takes as long as


def compress(
    model: nn.Module,
    recipe: Recipe,
    data: Iterable[Any] | Calibration | None,
    *,
    progress: Progress | None = None,
    compute_dtype: torch.dtype | None = None,
    journal: Journal | None = None,
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
        journal: where every finished group is kept and, of an earlier run given the same, taken from.

    Returns:
        what was done and how large the error is.

    Raises:
        SurgeryError: no MLP was found.
        BudgetError: the ratio is too small for this model and pattern.
        InvalidArgument: too little calibration data, a rank the model has no room for, ``include`` and
            ``exclude`` that leave nothing, or a journal of a run that was given something else.
        NumericalError: NaN or Inf in weights, activations or the loss; nothing is replaced in that group.
    """
    run = Compression(model, recipe, progress)
    if data is None and recipe.needs_data:
        raise InvalidArgument("data: None is allowed only with init='svd', steps=0 and distill_steps=0")
    owned = None
    if data is not None and not isinstance(data, Calibration):
        data = owned = calibrate(
            model,
            data,
            recipe.calibration_tokens,
            loss=recipe.needs_loss,
            keep_batches=batches_for(recipe.distill_steps),
            seed=recipe.seed,
            compute_dtype=compute_dtype,
            progress=run.meter.calibrated,
        )
    try:
        run.take(data)
        distributed.check_equal(run.inputs, "compress")
        for turn in (True, False):  # the folder is that of the first process, or each node has its own
            if journal is not None and (distributed.rank() == 0) == turn:
                journal.begin(run.inputs)
            distributed.barrier()
        run.plan()
        run.finish_groups(journal)
        if recipe.distill_steps > 0:
            run.distill()
            for group in run.groups:
                group.round()
    finally:
        if owned is not None:
            owned.close()
    attach(model)
    return run.report()


class Compression:
    """One compression, stage by stage: :func:`compress` goes group by group, a comparison looks in between.

    ``take``, ``plan``, then for every group ``initialise``, ``train`` and ``install``, in this order but with
    other groups in between or not; then ``distill`` and ``report``.

    Raises:
        SurgeryError, BudgetError, InvalidArgument, NumericalError: see :func:`compress`.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, progress: Progress | None = None) -> None:
        if memory.is_bounded() and recipe.distill_steps > 0:
            raise InvalidArgument(
                "distill_steps: trains all layers together, for which memory cannot be bounded; use 0, or no "
                "max_memory"
            )
        self.model, self.recipe = model, recipe
        self._start = time.perf_counter()
        self._mlps = select(find_mlps(model), recipe)
        for mlp in self._mlps:
            check_weights(mlp)
            memory.relax()
        self.groups = [Group.of(mlps, recipe) for mlps in group_mlps(self._mlps, recipe.group_size)]
        _check_rank(recipe, self._mlps)
        self._dense_bytes = _model_bytes(model)
        self._calibration: Calibration | None = None
        self._dense_losses: Tensor | None = None  # of a language model, on the probes
        self._divergence: tuple[float | None, float | None] = (None, None)
        self.inputs: dict[str, str] = {}  # all that the result depends on, see Journal.begin
        self.meter = _Meter(progress, len(self.groups), recipe)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @functools.cached_property
    def _teams(self) -> distributed.Teams:
        """All processes ask for them at once, and have as many groups: it is a collective call."""
        return distributed.Teams(len(self.groups))

    @property
    def device(self) -> torch.device:
        return self._mlps[0].up.weight.device

    def take(self, calibration: Calibration | None) -> None:
        """Take what was calibrated; the model is still dense."""
        recipe = self.recipe
        if calibration is not None:
            calibration.check(self._mlps, recipe.needs_loss, recipe.distill_steps > 0)
        self._calibration = calibration
        given = None if calibration is None else calibration.given
        self.inputs = {
            "recipe": json.dumps(recipe.to_dict()),
            "model": of_model(self.model),
            "calibration": Fingerprint().add(given).hexdigest(),
            "device": _device_name(self.device),
            "memory": "bounded" if memory.is_bounded() else "as it is",
            "number of threads": str(torch.get_num_threads()),
            "version of torch": torch.__version__,
            "version of fips_ext": __version__,
        }

    def plan(self) -> None:
        """Decide what each group stores."""
        recipe = self.recipe
        if self._calibration is not None and len(recipe.bases) > 1:
            self._dense_losses = self._token_losses()
        if recipe.effective_ranking == "model":
            if recipe.init != "svd":
                self._observe(self._teams.mine())
            # Plain pruning and a base need their bytes in different groups: divided is by the cheaper one, by
            # the first unless the other is clearly so.
            cost, plans = self._divided(recipe.bases[0])
            for base in recipe.bases[1:]:
                other, others = self._divided(base)
                if other < (1 - _PREDICTED_MARGIN) * cost:
                    cost, plans = other, others
            for group, plan in zip(self.groups, plans, strict=True):
                group.plan, group.allowed = plan, plan.spent(recipe.budget)

    def _divided(self, base: str) -> tuple[float, list[budget.Plan]]:
        """What all groups over one kind of base are predicted to cost, and the plans that cost least.

        A group that has no room for it keeps the plan that it has.
        """
        plans = []
        for group in self.groups:
            plan = group.plan
            with contextlib.suppress(BudgetError):
                plan = budget.solve(dataclasses.replace(self.recipe, base=base), plan.shape)
            plans.append(plan)
        led = [index for index in self._teams.mine() if self._teams.of(index).leads]
        parts = distributed.gather({index: self._curve(self.groups[index], plans[index]) for index in led})
        found = {index: result for part in parts for index, result in part.items()}
        curves, lost = zip(*(found[index] for index in range(len(plans))), strict=True)
        # Errors are in nats where gradients were looked at; else they have no scale.
        scale = LAYER_SCALE if self.recipe.needs_loss else math.inf
        plans = allocate(plans, curves, [plan.least_count for plan in plans], scale)
        dropped = sum(curve.dropped(plan.count) for curve, plan in zip(curves, plans, strict=True))
        return sum(lost) + dropped / 2, plans

    def _curve(self, group: Group, plan: budget.Plan) -> tuple[ScoreCurve, float]:
        """The scores of what a group may keep, and what it costs that it can keep no more."""
        problems = self._problems(group)
        curve = ScoreCurve.of(unit_scores(problems, plan, self.recipe))
        if plan.identity or plan.rank >= plan.shape.width:
            return curve, 0.0
        # What no V over so few vectors can hold.
        whole = sum(problem.energy() for layer in problems for problem in layer.values())
        return curve, max(0.0, whole - curve.dropped(0)) / 2

    def finish_groups(self, journal: Journal | None) -> None:
        """Initialise, train and install every group; those that a journal keeps come from there."""
        teams, alone = self._teams, distributed.size() == 1
        kept = [g for g in teams.mine() if teams.of(g).agree(journal is not None and journal.has(g))]
        # What cannot be compressed is found before anything is replaced.
        self._observe([g for g in teams.mine() if g not in kept])
        for index in teams.mine():
            group, team = self.groups[index], teams.of(index)
            finished = journal.load(index, group.names) if journal is not None and team.leads else None
            if team.agree(finished is not None):
                if finished is not None:
                    group.take(finished)
                self.meter.advance(self.recipe.steps + 1)
            else:
                self._work_on(group, team)
                if journal is not None and team.leads:
                    journal.store(index, group.finished())
            if alone:
                self._settle(group)
        if not alone:
            for index, group in enumerate(self.groups):
                team = distributed.everyone(teams.leader(index))
                group.take(FinishedGroup.of_leader(team, group.finished() if team.leads else None))
                self._settle(group)

    def _observe(self, groups: Iterable[int]) -> None:
        """Look at the MLPs of groups that this process works on, every team together."""
        if self._calibration is not None:
            for index in groups:
                for mlp in self.groups[index].mlps:
                    self._calibration.observe(mlp, self._teams.of(index))

    def _work_on(self, group: Group, team: distributed.Team) -> None:
        if team.leads:
            self.initialise(group)
        if team.size > 1:
            group.take(FinishedGroup.of_leader(team, group.finished() if team.leads else None))
        self.train(group, team)

    def _settle(self, group: Group) -> None:
        self.install(group)
        if self.recipe.distill_steps == 0:
            group.round()

    def initialise(self, group: Group) -> None:
        """The closed form, float32, not yet in the model; settles ``group.plan``.

        Of the bases that the recipe allows, at the same bytes, the one that bytes were divided for, unless
        another clearly costs the model's predictions less, see :meth:`_costs_alone`.
        """
        start = time.perf_counter()
        problems, device = self._problems(group), group.mlps[0].up.weight.device
        least = None
        plans = [group.plan, *self._other_plans(group)]
        for plan in plans:
            factors = factorise(problems, plan, self.recipe)
            shared = [mlp.to(device) for mlp in build(group.mlps, factors, plan)]
            if len(plans) == 1:
                costs = torch.zeros(1)
            elif self._calibration is None:
                costs = torch.tensor([factors.error])
            else:
                costs = self._costs_alone(group, shared)
            # Of a data-free start the error is what it is.
            chosen = least is None or (
                clearly_less(costs, least) if self._calibration is not None else bool(costs < least)
            )
            if chosen:
                least, group.plan, group.shared = costs, plan, shared
        self.meter.advance()
        group.seconds += time.perf_counter() - start

    def train(self, group: Group, team: distributed.Team = distributed.ALONE) -> None:
        """Block-wise."""
        if self._calibration is None:
            return
        start = time.perf_counter()
        group.before, group.after = train_group(
            group.shared,
            self._layer_data(group),
            self.recipe,
            self._calibration.compute_dtype,
            self.meter.advance,
            team,
        )
        group.seconds += time.perf_counter() - start

    def install(self, group: Group) -> None:
        """Put a group into the model, as it is: float32."""
        for dense, mlp in zip(group.mlps, group.shared, strict=True):
            dense.install(mlp)

    def distill(self) -> None:
        """Train all groups together; all must be installed."""
        self._divergence = distill(
            self.model,
            self._mlps,
            self._shared(),
            self._calibration.batches,
            steps=self.recipe.distill_steps,
            learning_rate=self.recipe.distill_learning_rate,
            compute_dtype=self._calibration.compute_dtype,
            seed=self.recipe.seed,
            on_step=self.meter.distilled,
        )

    @contextlib.contextmanager
    def rounded(self) -> Iterator[None]:
        """Within it the installed factors are what will be stored; after it, as exact as before."""
        masters = [(parameter, parameter.data) for mlp in self._shared() for parameter in mlp.parameters()]
        values: list[tuple[SparseFactor, FloatValues]] = []
        try:
            for group in self.groups:
                values += group.round()
            yield
        finally:
            for factor, before in values:
                factor.restore(before)
            for parameter, data in masters:
                parameter.data = data

    def report(self) -> Report:
        """What was done; the factors must be in the dtype of the model."""
        dense = sum(group.plan.shape.dense_bytes for group in self.groups)
        now = budget.mlp_bytes(self._shared())
        other_linear = describe(self.model)["block_linear_bytes"]
        macs = sum(budget.mlp_macs(mlp) for mlp in self._shared())
        return Report(
            layers=[layer for group in self.groups for layer in group.reports()],
            mlp_ratio=now / dense,
            linear_ratio=(now + other_linear) / (dense + other_linear),
            model_ratio=_model_bytes(self.model) / self._dense_bytes,
            macs_ratio=macs / sum(group.plan.shape.dense_macs for group in self.groups),
            divergence_before=self._divergence[0],
            divergence_after=self._divergence[1],
            calibration_tokens=0 if self._calibration is None else self._calibration.tokens,
            seconds=time.perf_counter() - self._start,
            peak_memory=_peak_memory(self.device),
            inputs=self.inputs,
        )

    def _shared(self) -> list[SharedMLP]:
        return [mlp for group in self.groups for mlp in group.shared]

    def _costs_alone(self, group: Group, shared: list[SharedMLP]) -> Tensor:
        """What ``shared`` does to every prediction of the model, all other groups dense, on held-out batches.

        Held out, because a base with values of its own fits what it has seen; the model, because errors over
        one base add up over its layers, which no layer shows alone. A language model is asked what it loses
        on the tokens of the text, any other how far it diverges from the dense one.
        """
        calibration = self._calibration
        with contextlib.ExitStack() as stack:
            for mlp in self._mlps:
                stack.enter_context(mlp.original())
            for dense, mlp in zip(group.mlps, shared, strict=True):
                stack.enter_context(dense.trial(mlp))
            if self._dense_losses is not None:
                return self._token_losses() - self._dense_losses
            return Divergence(self.model, group.mlps, calibration.compute_dtype).each(calibration.probes)

    def _token_losses(self) -> Tensor | None:
        """Of the model as it is, on held-out batches; None where it is no language model."""
        calibration = self._calibration
        dtype = product_dtype(self._mlps[0].up.weight, calibration.compute_dtype)
        return next_token_losses(self.model, calibration.probes, self.device, dtype)

    def _layer_data(self, group: Group) -> list[LayerData]:
        return [self._calibration.layer_data(mlp) for mlp in group.mlps]

    def _other_plans(self, group: Group) -> list[budget.Plan]:
        """Those of the other bases that the recipe allows."""
        plans = []
        for base in self.recipe.bases:
            if len(self.recipe.bases) == 1 or (base == "identity") == group.plan.identity:
                continue
            with contextlib.suppress(BudgetError):
                recipe = dataclasses.replace(self.recipe, base=base)
                plans.append(budget.solve(recipe, group.plan.shape, group.allowed))
        return plans

    def _problems(self, group: Group) -> list[dict[str, SliceProblem]]:
        """What the initialiser minimises, per layer."""
        if self._calibration is None or self.recipe.init == "svd":
            return [weight_problems(mlp) for mlp in group.mlps]
        return [self._calibration.problems(mlp, self.recipe.sensitivity) for mlp in group.mlps]


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


def clearly_less(costs: Tensor, least: Tensor) -> bool:
    """Whether the mean of ``costs`` is below that of ``least``, of the same predictions, by a margin.

    Of one prediction nobody knows what is chance.
    """
    saved = (least - costs).double()
    chance = float(saved.std()) / math.sqrt(saved.numel()) if saved.numel() > 1 else math.inf
    return float(saved.mean()) - _STANDARD_ERRORS * chance > _BASE_MARGIN * abs(float(least.double().mean()))


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


def _device_name(device: torch.device) -> str:
    """Of the kind of device: equal on machines that compute the same."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.backends.cpu.get_cpu_capability()}"


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if peak := memory.peak():  # unlike ru_maxrss, without what the parent of this process had
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
