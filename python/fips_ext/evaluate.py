"""Perplexity of a causal language model, by one fixed protocol.

Token level, windows without overlap, every token but the first of each window scored, log-softmax
in float32. The interval is a bootstrap over windows: it says how much the choice of text matters,
not how good the model is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InvalidArgument, NumericalError

QUICK_WINDOWS = 32
CONTEXT = 512

_BOOTSTRAP_SAMPLES = 1000
_BOOTSTRAP_SEED = 0
_CONFIDENCE = 0.95
# Rows of logits brought to float32 at a time: with the largest vocabularies (256k) 128 MiB.
_ROWS_PER_CHUNK = 128


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on.

    Attributes:
        perplexity: ``exp`` of the mean negative log-likelihood per scored token.
        interval: 95 % bootstrap interval over windows.
        tokens: scored tokens.
        windows: number of windows.
        context: tokens of one window.
    """

    perplexity: float
    interval: tuple[float, float]
    tokens: int
    windows: int
    context: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def perplexity(
    model: nn.Module, windows: Tensor, progress: Callable[[int, int], None] | None = None
) -> Perplexity:
    """Score ``windows`` with a transformers causal language model.

    Args:
        model: called as ``model(input_ids=[1, T]).logits``; scored in eval mode, on its own device.
        windows: int64 ``[N, T]``, ``T >= 2``.
        progress: called with (windows done, N) after every window.

    Raises:
        InvalidArgument: windows of a wrong shape, longer than the model's context, or outside its
            vocabulary.
        NumericalError: the model returned NaN or Inf for a window.
    """
    _check_windows(model, windows)
    device = next(model.parameters()).device
    losses = []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for index, window in enumerate(windows):
                loss = _window_loss(model, window.to(device))
                if not math.isfinite(loss):
                    raise NumericalError(
                        f"model: its logits in window {index} are not finite; "
                        "load it in float32 or look for NaN in its weights"
                    )
                losses.append(loss)
                if progress is not None:
                    progress(index + 1, len(windows))
    finally:
        model.train(was_training)
    scored = windows.shape[1] - 1
    means = torch.tensor(losses, dtype=torch.float64) / scored
    return Perplexity(
        perplexity=_exp(means.mean()),
        interval=_bootstrap_interval(means),
        tokens=len(losses) * scored,
        windows=len(losses),
        context=windows.shape[1],
    )


def _window_loss(model: nn.Module, window: Tensor) -> float:
    """Summed negative log-likelihood of ``window [T]`` after its first token."""
    logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
    targets = window[1:]
    total = 0.0
    for rows, wanted in zip(logits.split(_ROWS_PER_CHUNK), targets.split(_ROWS_PER_CHUNK), strict=True):
        total += nn.functional.cross_entropy(rows.float(), wanted, reduction="sum").item()
    return total


def _bootstrap_interval(means: Tensor) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(_BOOTSTRAP_SEED)
    count = means.numel()
    draws = torch.randint(count, (_BOOTSTRAP_SAMPLES, count), generator=generator)
    tail = (1 - _CONFIDENCE) / 2
    bounds = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = means[draws].mean(1).quantile(bounds)
    return _exp(low), _exp(high)


def _exp(value: Tensor) -> float:
    return float(value.exp())


def _check_windows(model: nn.Module, windows: Tensor) -> None:
    if windows.dim() != 2 or windows.dtype != torch.int64:
        raise InvalidArgument(
            f"windows: expected int64 [N, T], got {windows.dtype} {tuple(windows.shape)}; "
            "build them with fips_ext.integrations.text.token_windows"
        )
    count, length = windows.shape
    if count < 1 or length < 2:
        raise InvalidArgument(
            f"windows: got shape {(count, length)}; at least one window of two tokens is needed"
        )
    config = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise InvalidArgument(
            f"windows: {length} tokens long, but the model reads at most {longest}; use a shorter context"
        )
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and not 0 <= int(windows.min()) <= int(windows.max()) < vocabulary:
        raise InvalidArgument(
            f"windows: token ids in [{int(windows.min())}, {int(windows.max())}], but the model's "
            f"vocabulary has {vocabulary}; use the tokenizer that belongs to the model"
        )
