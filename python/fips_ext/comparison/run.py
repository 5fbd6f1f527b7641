"""Measuring the cells of a comparison: every method from one calibration, looked at after every stage."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .._compress import Compression
from ..errors import BudgetError
from ..recipe import Recipe
from ..train import Calibration, batches_for, calibrate
from .methods import Method
from .results import Results, Row

Evaluate = Callable[[nn.Module], dict[str, Any]]
Progress = Callable[[int, int], None]
ProgressBar = Callable[[str], contextlib.AbstractContextManager[Progress]]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method at one ratio."""

    method: Method
    ratio: float


@dataclasses.dataclass(frozen=True)
class Settings:
    """How cells are measured.

    Attributes:
        common: recipe fields that all methods share.
        evaluate: the quality of a model, per text.
        speed: of a compressed model beside the dense one; None measures none.
        every_stage: look at the quality after every stage, not only after the last.
    """

    common: dict[str, Any]
    evaluate: Evaluate
    speed: Callable[[nn.Module, nn.Module], dict[str, Any]] | None = None
    every_stage: bool = True

    def recipe(self, cell: Cell) -> Recipe:
        return cell.method.recipe(cell.ratio, **self.common)

    def calibrate(self, model: nn.Module, data: Iterable[Any], progress: Progress | None) -> Calibration:
        """One calibration for all methods: what any recipe with these fields needs."""
        recipe = Recipe(ratio=1.0, **self.common)
        return calibrate(
            model,
            data,
            recipe.calibration_tokens,
            keep_batches=batches_for(recipe.distill_steps),
            seed=recipe.seed,
            progress=progress,
        )


def run_cells(
    model: nn.Module,
    cells: list[Cell],
    data: Iterable[Any],
    settings: Settings,
    results: Results,
    *,
    note: Callable[[str], None] = lambda _: None,
    progress_bar: ProgressBar | None = None,
) -> list[Row]:
    """Measure what ``results`` does not hold yet; calibrates at most once.

    Args:
        model: the dense one; it is left as it is.
        data: model inputs to calibrate on; not looked at where nothing is left to measure.
        note: called with one line per cell.
        progress_bar: ``with progress_bar(what) as move: move(done, total)``, around calibration.

    Returns:
        The rows of ``cells``, in their order; a cell whose bytes no plan can meet is noted and left out.
    """
    if results.dense is None:
        results.dense = settings.evaluate(model)
        results.save()
    rows = []
    with contextlib.ExitStack() as stack:
        calibration = None
        for number, cell in enumerate(cells):
            row = results.find(cell.method.name, settings.recipe(cell))
            if row is None:
                if calibration is None:
                    with progress_bar("calibrating") if progress_bar else contextlib.nullcontext() as move:
                        calibration = stack.enter_context(settings.calibrate(model, data, move))
                note(f"{cell.method.name} at {cell.ratio} ({number + 1} of {len(cells)})")
                try:
                    row = _measure(model, cell, calibration, settings)
                except BudgetError as error:
                    note(f"left out: {error}")
                else:
                    results.add(row)
            if row is not None:
                rows.append(row)
    return rows


def _measure(model: nn.Module, cell: Cell, calibration: Calibration, settings: Settings) -> Row:
    compressed = copy.deepcopy(model)
    recipe = settings.recipe(cell)
    run = Compression(compressed, recipe)
    quality: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    last = "distilled" if recipe.distill_steps > 0 else "trained" if recipe.steps > 0 else "closed form"
    start = time.perf_counter()

    def look(stage: str) -> None:
        nonlocal start
        seconds[stage] = time.perf_counter() - start
        if settings.every_stage or stage == last:
            with run.rounded():
                quality[stage] = settings.evaluate(compressed)
        start = time.perf_counter()

    run.take(calibration)
    run.plan()
    for group in run.groups:
        run.initialise(group)
        run.install(group)
    look("closed form")
    if recipe.steps > 0:
        for group in run.groups:
            run.train(group)
        look("trained")
    if recipe.distill_steps > 0:
        run.distill()
        look("distilled")
    with run.rounded():
        report = run.report()
        speed = None if settings.speed is None else settings.speed(model, compressed)
    return Row(
        method=cell.method.name,
        family=cell.method.family,
        ratio=cell.ratio,
        seed=recipe.seed,
        quality=quality,
        mlp_ratio=report.mlp_ratio,
        linear_ratio=report.linear_ratio,
        model_ratio=report.model_ratio,
        macs_ratio=report.macs_ratio,
        speed=speed,
        seconds=seconds,
        recipe=recipe.to_dict(),
    )
