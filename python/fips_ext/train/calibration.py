"""What a model does on calibration data, seen once and used by any number of compressions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .. import distributed, memory
from ..errors import InvalidArgument
from ..fingerprint import Fingerprint
from ..init import SliceProblem
from ..surgery import DenseMLP, find_mlps
from .activations import ActivationStore, collect, held_out_rows
from .loop import LayerData
from .sensitivity import Sensitivity, SensitivityMeter
from .teacher import Observation, check_weights, observe
from .turns import sequences_of

_PROBED_TOKENS = 2048  # at most: differences of one model's variants, on the same tokens, need no more


class Calibration:
    """Inputs, outputs and sensitivities of every MLP of a dense model; made by :func:`calibrate`.

    Use it as a context manager, or call :meth:`close`: large ones lie in a temporary file.

    Attributes:
        names: of the MLPs, in model order.
        tokens: rows of each MLP.
        compute_dtype: of matrix products.
        batches: the model inputs, if they were kept.
        probes: model inputs of held-out rows, on which whole models are compared: at least one sequence.
        given: what it was made of, but for the model: a fingerprint of the model inputs, and the settings.
    """

    def __init__(
        self,
        names: list[str],
        store: ActivationStore,
        sensitivities: list[Sensitivity] | None,
        held_out: int,
        compute_dtype: torch.dtype,
        batches: list[Any],
        probes: list[Any],
        given: dict[str, Any],
    ) -> None:
        self.names, self.tokens, self.compute_dtype = names, store.tokens, compute_dtype
        self._store, self._sensitivities = store, sensitivities
        self._observations: dict[int, Observation] = {}
        self._closed = False
        self._held_out = held_out
        self.batches, self.probes = batches, probes
        self.given = given

    def __enter__(self) -> Calibration:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._closed = True
        self._store.close()
        self._observations.clear()
        self.batches.clear()
        self.probes.clear()

    def check(self, mlps: list[DenseMLP], needs_loss: bool, needs_batches: bool = False) -> None:
        """Raise ``InvalidArgument`` unless this is of ``mlps``, and holds what a recipe needs."""
        if self._closed:
            raise InvalidArgument("data: the Calibration is closed; call calibrate again")
        if not {mlp.name for mlp in mlps} <= set(self.names):
            raise InvalidArgument(
                "data: the Calibration is of a model with other MLPs; call calibrate on this one"
            )
        if needs_loss and self._sensitivities is None:
            raise InvalidArgument(
                "data: the Calibration was made with loss=False, but the recipe has sensitivity='loss'; "
                "make it with loss=True, or use sensitivity='output'"
            )
        if needs_batches and not self.batches:
            raise InvalidArgument(
                "data: the Calibration was made with keep_batches=0, but the recipe has distill_steps; "
                "make it with keep_batches, about as many, or use distill_steps=0"
            )

    def problems(self, mlp: DenseMLP, sensitivity: str) -> dict[str, SliceProblem]:
        """What an initialiser minimises for each role of ``mlp``; see ``Recipe.sensitivity``."""
        index = self.names.index(mlp.name)
        known = self._sensitivities[index] if sensitivity == "loss" and self._sensitivities else None
        return self._observe(index, mlp).problems(mlp, known)

    def layer_data(self, mlp: DenseMLP) -> LayerData:
        """What ``mlp`` trains and is measured on."""
        index = self.names.index(mlp.name)
        seen = self._observe(index, mlp)
        return LayerData(
            mlp.name,
            self._store.inputs[index],
            self._store.targets[index],
            seen.weights,
            seen.power,
            self._held_out,
        )

    def observe(self, mlp: DenseMLP, team: distributed.Team = distributed.ALONE) -> None:
        """Look at ``mlp`` now, and not when something of it is first asked for.

        Args:
            team: shares out the work; all of it must call this.

        Raises:
            NumericalError: NaN or Inf in its activations.
        """
        index = self.names.index(mlp.name)
        # Of earlier compressions, with other teams, some may know what the others do not.
        if team.any(index not in self._observations):
            self._observations.pop(index, None)
            self._observe(index, mlp, team)

    def _observe(self, index: int, mlp: DenseMLP, team: distributed.Team = distributed.ALONE) -> Observation:
        """When it is first asked for: not every process, nor every run, needs all MLPs."""
        if index not in self._observations:
            inputs, targets = self._store.inputs[index], self._store.targets[index]
            self._observations[index] = observe(
                mlp, inputs, targets, self.compute_dtype, self._held_out, team
            )
        return self._observations[index]


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    tokens: int,
    *,
    loss: bool = True,
    keep_batches: int = 0,
    seed: int = 0,
    compute_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Run a dense model over calibration data once, for one or more calls of :func:`fips_ext.compress`.

    Args:
        model: any model whose MLPs :func:`fips_ext.surgery.find_mlps` knows; it is not changed.
        data: model inputs: ids or pixel tensors, or dicts of keyword arguments.
        tokens: how many to take.
        loss: measure what errors cost in the model's predictions, by backward passes over a quarter of the
            tokens, at most 8192; needed by ``Recipe(sensitivity="loss")``.
        keep_batches: hold on to as many of the model inputs, for ``Recipe.distill_steps``; more than
            ``tokens`` needs are taken from ``data``, as far as it goes.
        seed: of the sampled predictions.
        compute_dtype: of matrix products; default bfloat16 for a model in a half precision, else float32.
        progress: called with (tokens, tokens needed).

    Raises:
        SurgeryError: no MLP was found.
        InvalidArgument: too little data, or none that the model takes.
        NumericalError: NaN or Inf in weights, or in what an MLP is given.
    """
    mlps = find_mlps(model)
    for mlp in mlps:
        check_weights(mlp)
        memory.relax()
    dtype = mlps[0].up.weight.dtype
    if compute_dtype is None:
        compute_dtype = torch.bfloat16 if dtype.itemsize == 2 else torch.float32
    store = ActivationStore([mlp.width for mlp in mlps], tokens, dtype)
    batches: list[Any] = []
    held_out = held_out_rows(tokens) if tokens > 1 else tokens
    probes = _Tail(range(tokens - min(held_out, _PROBED_TOKENS), tokens))
    fingerprint = Fingerprint()

    def see(batch: Any) -> None:
        probes.add(batch, store.found)
        fingerprint.add(batch)

    try:
        meter = SensitivityMeter(mlps, seed) if loss else None
        source = _kept(data, batches, keep_batches, see)
        collect(model, mlps, source, store, progress, meter)
        while len(batches) < keep_batches and next(source, None) is not None:
            pass
    except BaseException:
        store.close()
        raise
    sensitivities = None if meter is None else meter.result()
    names = [mlp.name for mlp in mlps]
    settings = {"tokens": tokens, "loss": loss, "seed": seed, "compute_dtype": compute_dtype}
    given = {"data": fingerprint.hexdigest(), **settings}
    return Calibration(names, store, sensitivities, held_out, compute_dtype, batches, probes.batches, given)


class _Tail:
    """The batches whose first row is one of ``rows``; where there is none, the last eighth of the last batch.

    A batch with rows on both sides is not held out; its last sequences are.
    """

    def __init__(self, rows: range) -> None:
        self._rows, self._first_row, self.batches = rows, -1, []

    def add(self, batch: Any, first_row: int) -> None:
        if first_row >= self._rows.stop:
            return
        if self._first_row < self._rows.start:
            self.batches.clear()
        self._first_row = first_row
        self.batches.append(batch if first_row >= self._rows.start else _last_eighth(batch))


def _last_eighth(batch: Any) -> Any:
    """The last sequences of a batch, at least one."""
    return sequences_of(batch, lambda count: slice(count * 7 // 8, None))


def _kept(data: Iterable[Any], batches: list[Any], limit: int, see: Callable[[Any], None]) -> Iterator[Any]:
    for batch in data:
        if len(batches) < limit:
            batches.append(batch)
        see(batch)
        yield batch
