"""Joint training of one group: every layer against its dense outputs, over the bases they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import functional, memory
from ..distributed import ALONE, Team
from ..errors import NumericalError
from ..layout import BlockSparse
from ..nn import SharedMLP
from ..recipe import Recipe
from .optimizer import RmsAdamW

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
    team: Team = ALONE,
) -> tuple[list[float], list[float]]:
    """Train the bases, values and biases of a group in place, all layers together.

    AdamW with a short warm-up and a cosine; the step size of each tensor is ``recipe.learning_rate`` times
    its RMS at the start. The parameters must be float32; products run in ``compute_dtype``. What training
    made worse on the held-out rows is thrown away.

    Args:
        team: processes that share out the rows of every step; all must call this with the same.

    Returns:
        held-out errors per layer, before and after, see :func:`relative_error`.

    Raises:
        NumericalError: a loss is NaN or Inf; the message names the layer.
    """
    before = _errors(mlps, data, compute_dtype)
    if recipe.steps == 0:
        return before, before
    start = [_copy_of(mlp) for mlp in mlps]
    bases = nn.ModuleList(base for mlp in mlps for base in (mlp.base, mlp.base_out) if base is not None)
    shared = set(bases.parameters())
    of_bases = RmsAdamW(bases.parameters(), recipe.learning_rate, recipe.steps)
    of_layers = [
        RmsAdamW([p for p in mlp.parameters() if p not in shared], recipe.learning_rate, recipe.steps)
        for mlp in mlps
    ]
    generator = torch.Generator().manual_seed(recipe.seed)
    batches = _Batches(data[0].trained, recipe.tokens_per_step, generator)
    for _ in range(recipe.steps):
        rows = batches.next()
        own = rows[team.place :: team.size]
        for mlp, layer, of_layer in zip(mlps, data, of_layers, strict=True):
            loss = _loss(mlp, layer, own, rows.numel(), compute_dtype)
            if not bool(loss.isfinite()):
                raise NumericalError(
                    f"{layer.name}: the loss became {float(loss)}; lower learning_rate, or check the weights "
                    "and the calibration data"
                )
            loss.backward()
            # No other loss depends on these, and gradients of one layer at a time are enough to hold.
            team.add_gradients(of_layer.parameters)
            of_layer.step()
            memory.relax()
        team.add_gradients(of_bases.parameters)
        of_bases.step()
        if on_step is not None:
            on_step()
    after = _errors(mlps, data, compute_dtype)
    if not sum(after) < sum(before):
        for mlp, state in zip(mlps, start, strict=True):
            mlp.load_state_dict(state)
            memory.relax()
        return before, before
    return before, after


def _copy_of(mlp: SharedMLP) -> dict[str, Tensor]:
    """Its ``state_dict``."""
    state = {}
    for name, tensor in mlp.state_dict().items():
        state[name] = memory.empty(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)
        memory.relax()
    return state


def _errors(mlps: list[SharedMLP], data: list[LayerData], compute_dtype: torch.dtype) -> list[float]:
    """:func:`relative_error` of every layer."""
    found = []
    for mlp, layer in zip(mlps, data, strict=True):
        found.append(relative_error(mlp, layer, compute_dtype))
        memory.relax()
    return found


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


def _loss(mlp: SharedMLP, layer: LayerData, rows: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Of ``rows``, a part of the ``count`` rows of a step."""
    device = mlp.up.values.device
    # The power of all tokens, not of the batch, so that every batch has the same unit.
    scale = 1 / max(layer.power * count, torch.finfo(torch.float32).tiny)
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
