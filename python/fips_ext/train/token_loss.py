"""What a language model loses on the tokens of a text.

Compressions that diverge from the dense model alike can differ in it: what they lose may be confidence or
knowledge.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import NumericalError
from .activations import evaluating, model_arguments
from .turns import token_mask

_CHUNK = 256  # rows of logits in float32 at a time
_IGNORED = -100


def _predicts_next_token(model: nn.Module) -> bool:
    """Whether the logits of ``model`` are those of the next token, as transformers' models tell."""
    can_generate = getattr(model, "can_generate", None)
    config = getattr(model, "config", None)
    return callable(can_generate) and can_generate() and not getattr(config, "is_encoder_decoder", False)


@torch.no_grad()
def next_token_losses(
    model: nn.Module, batches: list[Any], device: torch.device, compute_dtype: torch.dtype
) -> Tensor | None:
    """Negative log-likelihood, in nats, of every token of ``batches`` but the first of each sequence.

    In eval mode.

    Args:
        batches: ids ``[B, T]``, or dicts with ``input_ids`` and maybe ``attention_mask``.
        compute_dtype: of matrix products.

    Returns:
        float64 ``[tokens]``, padding left out; None where the model predicts no next token, is not given ids,
        or gives no logits for each of them.

    Raises:
        NumericalError: one is NaN or Inf.
    """
    if not _predicts_next_token(model):
        return None
    losses = [torch.zeros(0, dtype=torch.float64, device=device)]
    for batch in batches:
        args, kwargs = model_arguments(batch, device)
        with (
            evaluating(model),
            torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32),
        ):
            logits = getattr(model(*args, **kwargs), "logits", None)
        ids = args[0] if args else kwargs.get("input_ids")
        if logits is None or ids is None or logits.shape[:-1] != ids.shape:
            return None
        labels = _labels(ids, token_mask(kwargs)).flatten()
        for rows, wanted in zip(logits.flatten(0, 1).split(_CHUNK), labels.split(_CHUNK), strict=True):
            scored = wanted != _IGNORED
            losses.append(F.cross_entropy(rows[scored].float(), wanted[scored], reduction="none").double())
    found = torch.cat(losses)
    if not bool(found.isfinite().all()):
        raise NumericalError(
            "model: its loss on the calibration data holds NaN or Inf; check the weights and the data"
        )
    return found


def _labels(ids: Tensor, tokens: Tensor | None) -> Tensor:
    """The next token of every position, int64 ``[B, T]``; padding and the end are ignored."""
    labels = torch.full_like(ids, _IGNORED, dtype=torch.int64)
    labels[:, :-1] = ids[:, 1:]
    if tokens is not None:
        labels[:, :-1].masked_fill_(~tokens[:, 1:], _IGNORED)
    return labels
