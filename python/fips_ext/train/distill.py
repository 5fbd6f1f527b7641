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
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import NumericalError
from ..nn import SharedMLP
from ..surgery import DenseMLP
from .activations import model_arguments, token_mask
from .optimizer import rms_adamw
from .sensitivity import output_features

_CHUNK = 256  # rows of logits in float32 at a time

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
        the divergence (nats per prediction; for features half their relative squared error) on the held-out
        batches before and after. What made it worse is thrown away.

    Raises:
        NumericalError: the divergence is NaN or Inf.
    """
    own = dense[0].up.weight.dtype
    dtype = compute_dtype if own == torch.float32 else own
    runner = _Runner(model, dense, shared[0].base.weight.device, dtype)
    held_out = batches[-max(1, min(_MOST_HELD_OUT, len(batches) // 8)) :]
    trained = batches[: len(batches) - len(held_out)] or held_out
    before = runner.mean_divergence(held_out)
    start = [copy.deepcopy(mlp.state_dict()) for mlp in shared]
    generator = torch.Generator().manual_seed(seed)
    optimizer, schedule = rms_adamw(shared, learning_rate, steps)
    order: list[int] = []
    with _training(model, shared):
        for _ in range(steps):
            order = order or torch.randperm(len(trained), generator=generator).tolist()
            optimizer.zero_grad(set_to_none=True)
            runner.divergence(trained[order.pop()], backward=True)
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step()
    after = runner.mean_divergence(held_out)
    if not after < before:
        for mlp, state in zip(shared, start, strict=True):
            mlp.load_state_dict(state)
        return before, before
    return before, after


class _Runner:
    """Runs one batch through the dense and the compressed model."""

    def __init__(
        self, model: nn.Module, dense: list[DenseMLP], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model, self.dense, self.device, self.dtype = model, dense, device, dtype

    @torch.no_grad()
    def mean_divergence(self, batches: Batches) -> float:
        return sum(self.divergence(batch) for batch in batches) / len(batches)

    def divergence(self, batch: Any, backward: bool = False) -> float:
        """Mean over the predictions of a batch; ``backward`` adds gradients of the sum to the parameters."""
        args, kwargs = model_arguments(batch, self.device)
        with torch.no_grad(), _originals(self.dense):
            expected, is_logits = _result(self.model(*args, **kwargs))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            found, _ = _result(self.model(*args, **kwargs))
        tokens = token_mask(kwargs)
        if tokens is None or tokens.shape != found.shape[:-1]:
            tokens = torch.ones(found.shape[:-1], dtype=torch.bool)
        weight = tokens.flatten().to(self.device, torch.float32)
        rows, targets = found.reshape(-1, found.shape[-1]), expected.reshape(-1, expected.shape[-1])
        gradient = torch.empty_like(rows) if backward else None
        total = 0.0
        for start in range(0, rows.shape[0], _CHUNK):
            chunk = slice(start, start + _CHUNK)
            x, t = rows[chunk].detach().float(), targets[chunk].float()
            with torch.set_grad_enabled(backward):
                x.requires_grad_(backward)
                loss = weight[chunk] @ (_logit_divergence(x, t) if is_logits else _feature_divergence(x, t))
            if backward:
                gradient[chunk] = torch.autograd.grad(loss, x)[0].to(gradient.dtype)
            total += float(loss.detach())
        if not torch.isfinite(torch.tensor(total)):
            raise NumericalError(
                f"distill: the divergence from the dense model became {total}; lower learning_rate, or check "
                "the weights and the calibration data"
            )
        if backward:
            # Of the sum: AdamW does not see the scale, and half precision would lose that of the mean.
            rows.backward(gradient)
        return total / max(1.0, float(weight.sum()))


def _logit_divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """``KL(expected ‖ found)`` of each row."""
    return F.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), reduction="none", log_target=True).sum(
        -1
    )


def _feature_divergence(features: Tensor, expected: Tensor) -> Tensor:
    power = expected.square().sum(-1).clamp_min(torch.finfo(expected.dtype).tiny)
    return 0.5 * (features - expected).square().sum(-1) / power


def _result(output: Any) -> tuple[Tensor, bool]:
    """The tensor that is compared, and whether it holds logits of classes."""
    logits = getattr(output, "logits", None)
    return (output_features(output), False) if logits is None else (logits, True)


@contextlib.contextmanager
def _originals(dense: list[DenseMLP]) -> Iterator[None]:
    """Within it, the model computes with its dense MLPs."""
    with contextlib.ExitStack() as stack:
        for mlp in dense:
            stack.enter_context(mlp.original())
        yield


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
