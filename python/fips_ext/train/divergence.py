"""How far the predictions of a compressed model are from those of the dense one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import NumericalError
from ..surgery import DenseMLP
from .activations import evaluating, model_arguments, product_dtype
from .sensitivity import named_output, output_features
from .turns import token_mask

_CHUNK = 256  # rows of logits in float32 at a time


class Divergence:
    """Runs batches through the dense and the compressed model, both in eval mode.

    What is compared are logits, by ``KL(dense ‖ compressed)`` in nats per prediction, or features, by half
    their relative squared error.

    Args:
        model: computes with what is installed in place of ``dense``.
        dense: the MLPs that were replaced; those that were not are used as they are.
        compute_dtype: of matrix products, where the model is float32; else they have its dtype.
    """

    def __init__(self, model: nn.Module, dense: list[DenseMLP], compute_dtype: torch.dtype) -> None:
        weight = dense[0].up.weight
        self._model, self._dense, self._device = model, dense, weight.device
        self._dtype = product_dtype(weight, compute_dtype)

    @torch.no_grad()
    def each(self, batches: list[Any]) -> Tensor:
        """Of every prediction of ``batches`` that is no padding, float64.

        Raises:
            NumericalError: one is NaN or Inf.
        """
        return torch.cat([self._of(batch) for batch in batches])

    def mean(self, batches: list[Any]) -> float:
        """Over predictions, which count alike.

        Raises:
            NumericalError: it is NaN or Inf.
        """
        return _mean(self.each(batches))

    def backward(self, batch: Any) -> float:
        """Mean of one batch; adds gradients of the sum over its predictions to the parameters.

        Raises:
            NumericalError: it is NaN or Inf.
        """
        return _mean(self._of(batch, backward=True))

    def _of(self, batch: Any, backward: bool = False) -> Tensor:
        args, kwargs = model_arguments(batch, self._device)
        with evaluating(self._model):
            with torch.no_grad(), _originals(self._dense):
                expected, is_logits = self._result(args, kwargs)
            with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
                found, _ = self._result(args, kwargs)
        tokens = token_mask(kwargs)
        if tokens is None or tokens.shape != found.shape[:-1]:
            tokens = torch.ones(found.shape[:-1], dtype=torch.bool)
        weight = tokens.flatten().to(self._device, torch.float32)
        rows, targets = found.reshape(-1, found.shape[-1]), expected.reshape(-1, expected.shape[-1])
        gradient = torch.empty_like(rows) if backward else None
        losses = []
        for start in range(0, rows.shape[0], _CHUNK):
            chunk = slice(start, start + _CHUNK)
            x, t = rows[chunk].detach().float(), targets[chunk].float()
            with torch.set_grad_enabled(backward):
                x.requires_grad_(backward)
                loss = _logit_divergence(x, t) if is_logits else _feature_divergence(x, t)
            if backward:
                gradient[chunk] = torch.autograd.grad(weight[chunk] @ loss, x)[0].to(gradient.dtype)
            losses.append(loss.detach()[weight[chunk] > 0].double())
        found_losses = torch.cat(losses)
        if not bool(found_losses.isfinite().all()):
            raise NumericalError(
                f"model: its divergence from the dense model is {_mean(found_losses)}; lower learning_rate, "
                "check the weights and the calibration data, or load the model in bfloat16 or float32"
            )
        if backward:
            # Of the sum: AdamW does not see the scale, and half precision would lose that of the mean.
            rows.backward(gradient)
        return found_losses

    def _result(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, bool]:
        """The tensor that is compared, and whether it holds logits of classes."""
        output = named_output(self._model, self._model(*args, **kwargs))
        logits = getattr(output, "logits", None)
        return (output_features(output), False) if logits is None else (logits, True)


def _mean(losses: Tensor) -> float:
    return float(losses.sum()) / max(1, losses.numel())


def _logit_divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """``KL(expected ‖ found)`` of each row."""
    return F.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), reduction="none", log_target=True).sum(
        -1
    )


def _feature_divergence(features: Tensor, expected: Tensor) -> Tensor:
    power = expected.square().sum(-1).clamp_min(torch.finfo(expected.dtype).tiny)
    return 0.5 * (features - expected).square().sum(-1) / power


@contextlib.contextmanager
def _originals(dense: list[DenseMLP]) -> Iterator[None]:
    """Within it, the model computes with its dense MLPs."""
    with contextlib.ExitStack() as stack:
        for mlp in dense:
            stack.enter_context(mlp.original())
        yield
