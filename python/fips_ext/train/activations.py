"""Collecting the inputs of every MLP in one pass over the calibration data, in bounded memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed, memory
from ..errors import InvalidArgument, NumericalError
from ..surgery import DenseMLP
from .sensitivity import SensitivityMeter, named_output
from .turns import Turns, token_mask

# Of the tokens: a backward pass costs twice a forward pass, and second moments need no more.
_METERED_SHARE, _METERED_TOKENS = 0.25, 8192

HOST_LIMIT = 4 * 2**30
"""Bytes of activations above which they go to a temporary file instead of memory."""


class ActivationStore:
    """Inputs and targets of each MLP, ``[tokens, d]`` each, on the host or mapped from a scratch file.

    Use it as a context manager, or call :meth:`close`: that lets go of the file.

    Args:
        widths: ``d`` of each MLP.
        tokens: rows to hold of each.
        dtype: of the activations.
        limit: bytes to hold in memory, default :data:`HOST_LIMIT`, or none within ``memory.bounded``.
    """

    def __init__(self, widths: list[int], tokens: int, dtype: torch.dtype, limit: int | None = None) -> None:
        self.tokens = tokens
        self.filled = [0] * len(widths)
        total = 2 * sum(widths) * tokens
        self.spilled = total * dtype.itemsize > (HOST_LIMIT if limit is None else limit)
        """Whether the activations are in a file."""
        bounded = memory.is_bounded()
        flat = memory.scratch(total, dtype) if self.spilled and not bounded else memory.empty((total,), dtype)
        parts = [
            part.view(tokens, width)
            for part, width in zip(flat.split([w * tokens for w in 2 * widths]), 2 * widths, strict=True)
        ]
        self.inputs, self.targets = parts[: len(widths)], parts[len(widths) :]

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        self.inputs.clear()
        self.targets.clear()

    def add(self, index: int, x: Tensor) -> None:
        """Append rows ``[T, d]`` of one MLP, as many as fit."""
        start = self.filled[index]
        rows = x[: self.tokens - start]
        self.inputs[index][start : start + rows.shape[0]] = rows.to(self.inputs[index])
        self.filled[index] += rows.shape[0]

    def skip(self, index: int, rows: int) -> None:
        """Leave room for rows that another process has, as many as fit."""
        start = self.filled[index]
        stop = min(self.tokens, start + rows)
        self.inputs[index][start:stop] = 0
        self.filled[index] = stop

    def join(self) -> None:
        """Get the rows of all processes."""
        if distributed.size() > 1:
            for inputs in self.inputs:
                distributed.join_parts(inputs)
                memory.relax()

    @property
    def found(self) -> int:
        """Tokens of the MLP that has the fewest."""
        return min(self.filled)


def collect(
    model: nn.Module,
    mlps: list[DenseMLP],
    data: Iterable[Any],
    store: ActivationStore,
    progress: Callable[[int, int], None] | None = None,
    meter: SensitivityMeter | None = None,
) -> None:
    """Run ``model`` over ``data`` until the store is full.

    Args:
        data: model inputs: a tensor (the first argument) or a mapping of keyword arguments, whose
            ``attention_mask [B, T]``, where present, marks padding that is left out.
        progress: called with (tokens, tokens needed).
        meter: gets the gradients of the first batches, a quarter of the tokens but at most 8192.

    Raises:
        InvalidArgument: ``data`` ends too early, or is no iterable of tensors or mappings.
        NumericalError: an input of an MLP is NaN or Inf.
    """
    attention: Tensor | None = None

    def hook_of(index: int, name: str):
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            if store.filled[index] >= store.tokens:
                return
            x = args[0] if args else next(iter(kwargs.values()))
            x = x.detach().reshape(-1, x.shape[-1])  # OPT's MLPs get their tokens flat as it is
            if attention is not None and attention.numel() == x.shape[0]:
                x = x[attention.to(x.device).flatten()]
            if not bool(x.isfinite().all()):
                raise NumericalError(
                    f"{name}: its input on the calibration data holds NaN or Inf; check the data, or load "
                    "the model in bfloat16 or float32"
                )
            store.add(index, x)
            memory.relax()

        return hook

    device = mlps[0].up.weight.device
    metered = 0 if meter is None else min(_METERED_SHARE * store.tokens, _METERED_TOKENS)
    handles = [
        mlp.entry.register_forward_pre_hook(hook_of(i, mlp.name), with_kwargs=True)
        for i, mlp in enumerate(mlps)
    ]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    turns = Turns(store, meter)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)  # gradients of activations are wanted, none of weights
        for batch in data:
            args, kwargs = model_arguments(batch, device)
            attention = token_mask(kwargs)
            is_metered = store.found < metered
            with turns.next(batch, is_metered) as is_run:
                if is_run and is_metered:
                    with torch.enable_grad(), memory.kept_graph(), evaluating(model), meter.attached():
                        meter.backward(named_output(model, model(*args, **kwargs)), attention)
                elif is_run:
                    with torch.no_grad(), evaluating(model):
                        model(*args, **kwargs)
            if progress is not None:
                progress(store.found, store.tokens)
            if store.found >= store.tokens:
                store.join()
                if meter is not None:
                    meter.join()
                return
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    raise InvalidArgument(
        f"data: {store.found} tokens found, {store.tokens} needed; give more calibration data or lower "
        "calibration_tokens"
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it, every module is in eval mode: no dropout, no statistics of batches."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def product_dtype(weight: Tensor, compute_dtype: torch.dtype) -> torch.dtype:
    """Of the matrix products of a whole model: that of its weights, unless they are float32."""
    return compute_dtype if weight.dtype == torch.float32 else weight.dtype


def model_arguments(batch: Any, device: torch.device) -> tuple[tuple, dict[str, Any]]:
    """A batch of calibration data as arguments of a model on ``device``."""
    if isinstance(batch, Tensor):
        return (batch.to(device),), {}
    if isinstance(batch, Mapping):
        return (), {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}
    raise InvalidArgument(
        f"data: yields {type(batch).__name__}; each item must be a tensor or a dict of keyword arguments"
    )


def held_out_rows(tokens: int) -> int:
    """Calibration tokens kept back to measure on: an eighth, at least one."""
    return max(1, math.ceil(tokens / 8))
