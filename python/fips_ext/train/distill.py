"""The last stage: all layers together, against the predictions of the dense model.

Block-wise training cannot weigh one layer's error against another's, nor let a layer make good what an
earlier one lost. Here the divergence of the model's own output is minimised (Hinton, Vinyals and Dean 2015,
at temperature 1), without labels; masks stay as they are.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import everyone
from ..nn import SharedMLP
from ..surgery import DenseMLP
from .divergence import Divergence
from .optimizer import RmsAdamW
from .turns import sequences_of

_MOST_HELD_OUT = 8

Batches = list[Any]


def batches_for(steps: int) -> int:
    """Batches with which :func:`distill` sees each one once: those of the steps, and those held out."""
    return steps + min(_MOST_HELD_OUT, -(-steps // 7))


def distill(
    model: nn.Module,
    dense: list[DenseMLP],
    shared: list[SharedMLP],
    batches: Batches,
    *,
    steps: int,
    learning_rate: float,
    compute_dtype: torch.dtype,
    seed: int = 0,
    on_step: Callable[[], None] | None = None,
) -> tuple[float, float]:
    """Train the factors of a compressed model in place, on one batch a step.

    Args:
        model: with ``shared`` installed in place of ``dense``; the rest of it is not trained.
        shared: float32 parameters.
        batches: model inputs; the last eighth, at least one if there are two and at most 8, is held
            out.
        learning_rate: relative to the RMS of each tensor.
        compute_dtype: of matrix products, where the rest of the model is float32; else they have its dtype.

    Returns:
        the :class:`~.divergence.Divergence` on the held-out batches before and after. What made it worse is
        thrown away.

    Raises:
        NumericalError: the divergence is NaN or Inf.
    """
    divergence = Divergence(model, dense, compute_dtype)
    held_out = batches[-max(1, min(_MOST_HELD_OUT, len(batches) // 8)) :]
    trained = batches[: len(batches) - len(held_out)] or held_out
    before = divergence.mean(held_out)
    start = [copy.deepcopy(mlp.state_dict()) for mlp in shared]
    generator = torch.Generator().manual_seed(seed)
    optimizer = RmsAdamW(nn.ModuleList(shared).parameters(), learning_rate, steps)
    order: list[int] = []
    team = everyone()
    with _training(model, shared):
        for _ in range(steps):
            order = order or torch.randperm(len(trained), generator=generator).tolist()
            batch = trained[order.pop()]
            part = sequences_of(batch, lambda count: slice(team.place, count, team.size))
            if _count(part):
                divergence.backward(part)
            team.add_gradients(optimizer.parameters)
            optimizer.step()
            if on_step is not None:
                on_step()
    after = divergence.mean(held_out)
    if not after < before:
        for mlp, state in zip(shared, start, strict=True):
            mlp.load_state_dict(state)
        return before, before
    return before, after


def _count(batch: Any) -> int:
    """Sequences, as the first tensor has them."""
    tensors = [batch] if isinstance(batch, Tensor) else [t for t in batch.values() if isinstance(t, Tensor)]
    return tensors[0].shape[0] if tensors else 1


@contextlib.contextmanager
def _training(model: nn.Module, shared: list[SharedMLP]) -> Iterator[None]:
    """Within it, the parameters of ``shared`` are the only ones that get gradients."""
    state = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in state:
            parameter.requires_grad_(False)
        for parameter in nn.ModuleList(shared).parameters():
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, wanted in state:
            parameter.requires_grad_(wanted)
