"""Joint training of one group: every layer against its dense outputs, over the bases they share."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from .. import functional
from ..errors import NumericalError
from ..layout import BlockSparse
from ..nn import SharedMLP
from ..recipe import Recipe
from .optimizer import rms_adamw

_CHUNK = 2048


@dataclasses.dataclass
class LayerData:
    """What one layer trains and is measured on.

    Attributes:
        name: for messages.
        inputs, targets: ``[tokens, d]`` on the host.
        weights: what each token counts ``[tokens]``, at most 1; see :func:`~.teacher.token_weights`.
        power: weighted mean of ``‖target‖²``: the unit of the loss.
        held_out: trailing rows that training never sees.
    """

    name: str
    inputs: Tensor
    targets: Tensor
    weights: Tensor
    power: float
    held_out: int

    @property
    def trained(self) -> int:
        return self.inputs.shape[0] - self.held_out


def train_group(
    mlps: list[SharedMLP],
    data: list[LayerData],
    recipe: Recipe,
    compute_dtype: torch.dtype,
    on_step: Callable[[], None] | None = None,
) -> tuple[list[float], list[float]]:
    """Train the bases, values and biases of a group in place, all layers together.

    AdamW with a short warm-up and a cosine; the step size of each tensor is ``recipe.learning_rate`` times
    its RMS at the start. The parameters must be float32; products run in ``compute_dtype``. What training
    made worse on the held-out rows is thrown away.

    Returns:
        held-out errors per layer, before and after, see :func:`relative_error`.

    Raises:
        NumericalError: a loss is NaN or Inf; the message names the layer.
    """
    before = [relative_error(mlp, d, compute_dtype) for mlp, d in zip(mlps, data, strict=True)]
    if recipe.steps == 0:
        return before, before
    start = [copy.deepcopy(mlp.state_dict()) for mlp in mlps]
    optimizer, schedule = rms_adamw(mlps, recipe.learning_rate, recipe.steps)
    generator = torch.Generator().manual_seed(recipe.seed)
    batches = _Batches(data[0].trained, recipe.tokens_per_step, generator)
    for _ in range(recipe.steps):
        rows = batches.next()
        optimizer.zero_grad(set_to_none=True)
        for mlp, layer in zip(mlps, data, strict=True):
            loss = _loss(mlp, layer, rows, compute_dtype)
            if not bool(loss.isfinite()):
                raise NumericalError(
                    f"{layer.name}: the loss became {float(loss)}; lower learning_rate, or check the weights "
                    "and the calibration data"
                )
            loss.backward()
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step()
    after = [relative_error(mlp, d, compute_dtype) for mlp, d in zip(mlps, data, strict=True)]
    if not sum(after) < sum(before):
        for mlp, state in zip(mlps, start, strict=True):
            mlp.load_state_dict(state)
        return before, before
    return before, after


def relative_error(mlp: SharedMLP, layer: LayerData, compute_dtype: torch.dtype) -> float:
    """``Σ w ‖y − target‖² / Σ w ‖target‖²`` over the held-out rows, ``w`` the token weights."""
    arguments = cast_arguments(mlp, compute_dtype)
    device = mlp.up.values.device
    error = power = 0.0
    for start in range(layer.trained, layer.inputs.shape[0], _CHUNK):
        rows = slice(start, start + _CHUNK)
        with torch.no_grad():
            target, weight = layer.targets[rows].to(device).float(), layer.weights[rows].to(device)
            y = functional.shared_mlp(layer.inputs[rows].to(device, compute_dtype), **arguments).float()
        if not bool(y.isfinite().all()):
            raise NumericalError(f"{layer.name}: its compressed output holds NaN or Inf")
        error += float(weight @ (y - target).square().sum(1))
        power += float(weight @ target.square().sum(1))
    return error / power if power > 0 else 0.0


def cast_arguments(mlp: SharedMLP, dtype: torch.dtype) -> dict:
    """``mlp.op_arguments()`` with every parameter cast, differentiably."""

    def cast(value):
        if isinstance(value, BlockSparse) and value.bits is None:
            return value.with_values(value.values.to(dtype))
        return value.to(dtype) if isinstance(value, Tensor) else value

    return {name: cast(value) for name, value in mlp.op_arguments().items()}


def _loss(mlp: SharedMLP, layer: LayerData, rows: Tensor, dtype: torch.dtype) -> Tensor:
    device = mlp.up.values.device
    # The power of all tokens, not of the batch, so that every batch has the same unit.
    scale = 1 / max(layer.power * rows.numel(), torch.finfo(torch.float32).tiny)
    return functional.reconstruction_loss(
        layer.inputs[rows].to(device, dtype),
        layer.targets[rows].to(device, dtype),
        scale=scale,
        token_weight=layer.weights[rows].to(device),
        **cast_arguments(mlp, dtype),
    )


class _Batches:
    """Row numbers of each step: passes over all rows, each in a new random order."""

    def __init__(self, rows: int, size: int, generator: torch.Generator) -> None:
        self.rows, self.size, self.generator = rows, min(size, rows), generator
        self.order, self.position = torch.randperm(rows, generator=generator), 0

    def next(self) -> Tensor:
        if self.position + self.size > self.rows:
            self.order, self.position = torch.randperm(self.rows, generator=self.generator), 0
        rows = self.order[self.position : self.position + self.size]
        self.position += self.size
        return rows
