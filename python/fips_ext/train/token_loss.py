"""What a language model loses on the tokens of a text.

Compressions that diverge from the dense model alike can differ in it: what they lose may be confidence or
knowledge.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import NumericalError
from .activations import evaluating, model_arguments, token_mask

_CHUNK = 256  # rows of logits in float32 at a time
_IGNORED = -100


def _predicts_next_token(model: nn.Module) -> bool:
    """Whether the logits of ``model`` are those of the next token, as transformers' models tell."""
    can_generate = getattr(model, "can_generate", None)
    config = getattr(model, "config", None)
    return callable(can_generate) and can_generate() and not getattr(config, "is_encoder_decoder", False)


@torch.no_grad()
def next_token_loss(
    model: nn.Module, batches: list[Any], device: torch.device, compute_dtype: torch.dtype
) -> float | None:
    """Mean negative log-likelihood, in nats, of every token of ``batches`` but the first of each sequence.

    In eval mode.

    Args:
        batches: ids ``[B, T]``, or dicts with ``input_ids`` and maybe ``attention_mask``.
        compute_dtype: of matrix products.

    Returns:
        None where the model predicts no next token, is not given ids, or gives no logits for each of them.

    Raises:
        NumericalError: it is NaN or Inf.
    """
    if not _predicts_next_token(model):
        return None
    total, count = 0.0, 0
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
            total += float(F.cross_entropy(rows.float(), wanted, reduction="sum", ignore_index=_IGNORED))
        count += int((labels != _IGNORED).sum())
    if not math.isfinite(total):
        raise NumericalError(
            f"model: its loss on the calibration data is {total}; check the weights and the data"
        )
    return total / max(1, count)


def _labels(ids: Tensor, tokens: Tensor | None) -> Tensor:
    """The next token of every position, int64 ``[B, T]``; padding and the end are ignored."""
    labels = torch.full_like(ids, _IGNORED, dtype=torch.int64)
    labels[:, :-1] = ids[:, 1:]
    if tokens is not None:
        labels[:, :-1].masked_fill_(~tokens[:, 1:], _IGNORED)
    return labels
