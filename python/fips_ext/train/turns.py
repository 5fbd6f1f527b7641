"""Dealing out batches of calibration data to processes, without any of them asking another.

A process that does not run a batch has to know how many rows each MLP sees of it, and what was drawn at
random for it: the next one goes on as if it had. Both follow from the first batch, which every process runs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import distributed
from ..errors import InvalidArgument

if TYPE_CHECKING:
    from .activations import ActivationStore
    from .sensitivity import SensitivityMeter


class Turns:
    """Whose turn it is.

    Args:
        store: gets the rows of the batches that are run here, and leaves room for the others'.
        meter: sees the first batches.
    """

    def __init__(self, store: ActivationStore, meter: SensitivityMeter | None) -> None:
        self._store, self._meter = store, meter
        self._number = 0
        self._tokens = self._positions = 0  # of the first batch
        self._rows: list[int] = []  # of each MLP, of the first batch
        self._outputs = 0

    @contextlib.contextmanager
    def next(self, batch: Any, is_metered: bool) -> Iterator[bool]:
        """Within it the batch is run here, if that is what it yields."""
        mine = self._number % distributed.size() == distributed.rank()
        first, self._number = self._number == 0, self._number + 1
        before = list(self._store.filled)
        yield mine or first
        if distributed.size() == 1:
            return
        tokens, positions = _tokens(batch), _positions(batch)
        if first:
            self._tokens, self._positions = tokens, positions
            self._rows = [now - then for now, then in zip(self._store.filled, before, strict=True)]
            if is_metered:
                shape = self._meter.seen_shape
                self._outputs = math.prod(shape[:-1])
            if not mine:
                self._forget_first()
        elif mine:
            self._check(before, tokens)
            drawn = math.prod(self._meter.seen_shape[:-1]) if is_metered else 0
            if is_metered and drawn != self._outputs * positions // self._positions:
                raise InvalidArgument(
                    f"data: the model gives {drawn} predictions for a batch of {positions} positions, but "
                    f"{self._outputs} for the first, of {self._positions}; give batches of one kind, or use "
                    "one process"
                )
        else:
            for index, rows in enumerate(self._rows):
                self._store.skip(index, rows * tokens // self._tokens)
            if is_metered:
                self._meter.skip(self._outputs * positions // self._positions)

    def _forget_first(self) -> None:
        for index, rows in enumerate(self._rows):
            self._store.inputs[index][:rows] = 0
        if self._meter is not None:
            self._meter.forget()

    def _check(self, before: list[int], tokens: int) -> None:
        for then, now, rows in zip(before, self._store.filled, self._rows, strict=True):
            expected = min(self._store.tokens, then + rows * tokens // self._tokens)
            if now != expected:
                raise InvalidArgument(
                    f"data: the MLPs see {now - then} rows of a batch of {tokens} tokens, but {rows} of the "
                    f"first, which has {self._tokens}; give batches of one kind, or use one process"
                )


def token_mask(kwargs: dict[str, Any]) -> Tensor | None:
    """Which tokens are no padding, bool ``[B, T]``; None where the model is not told."""
    mask = kwargs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def sequences_of(batch: Any, which: Callable[[int], slice]) -> Any:
    """Some sequences of a batch.

    Args:
        which: of so many.
    """
    if isinstance(batch, Tensor):
        return batch[which(batch.shape[0])]
    size = max((t.shape[0] for t in batch.values() if isinstance(t, Tensor) and t.dim()), default=0)

    def cut(value: Any) -> Any:
        along = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
        return value[which(size)] if along else value

    return {key: cut(value) for key, value in batch.items()}


def _tokens(batch: Any) -> int:
    """What the rows of an MLP are in proportion to."""
    mask = None if isinstance(batch, Tensor) else token_mask(batch)
    return _positions(batch) if mask is None else int(mask.sum())


def _positions(batch: Any) -> int:
    """What the rows of the output are in proportion to."""
    if isinstance(batch, Tensor):
        return batch.numel()
    return next((value.numel() for value in batch.values() if isinstance(value, Tensor)), 1)
