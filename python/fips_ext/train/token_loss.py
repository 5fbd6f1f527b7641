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
from .activations import model_arguments, token_mask

_CHUNK = 256  # rows of logits in float32 at a time
_IGNORED = -100


def predicts_next_token(model: nn.Module) -> bool:
    """Whether the logits of ``model`` are those of the next token, as transformers' models tell."""
    can_generate = getattr(model, "can_generate", None)
    config = getattr(model, "config", None)
    return callable(can_generate) and can_generate() and not getattr(config, "is_encoder_decoder", False)


@torch.no_grad()
def next_token_loss(
    model: nn.Module, batches: list[Any], device: torch.device, compute_dtype: torch.dtype
) -> float:
    """Mean negative log-likelihood, in nats, of every token of ``batches`` but the first of each sequence.

    Args:
        batches: ids ``[B, T]``, or dicts with ``input_ids`` and maybe ``attention_mask``.
        compute_dtype: of matrix products.

    Raises:
        NumericalError: it is NaN or Inf.
    """
    total, count = 0.0, 0
    for batch in batches:
        args, kwargs = model_arguments(batch, device)
        with torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
            rows = model(*args, **kwargs).logits[:, :-1].flatten(0, 1)
        labels = _labels(args[0] if args else kwargs["input_ids"], token_mask(kwargs))
        for logits, wanted in zip(rows.split(_CHUNK), labels.split(_CHUNK), strict=True):
            loss = F.cross_entropy(logits.float(), wanted, reduction="sum", ignore_index=_IGNORED)
            total += float(loss)
        count += int((labels != _IGNORED).sum())
    if not math.isfinite(total):
        raise NumericalError(
            f"model: its loss on the calibration data is {total}; check the weights and the data"
        )
    return total / max(1, count)


def _labels(ids: Tensor, tokens: Tensor | None) -> Tensor:
    """The next token of every position but the last, ``[B (T − 1)]``; padding is ignored."""
    labels = ids[:, 1:]
    if tokens is not None:
        labels = labels.masked_fill(~tokens[:, 1:], _IGNORED)
    return labels.flatten()
