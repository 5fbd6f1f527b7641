"""Speed of a causal language model: decode and prefill tokens per second, alone or in a pair."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InvalidArgument

_SEED = 0


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        prompt_tokens: length of the prompt that prefill reads.
        new_tokens: tokens decoded greedily after it, one at a time (batch 1, KV cache).
        repeats: timed runs; the median counts.
        warmup: runs before them that do not count.
    """

    prompt_tokens: int = 128
    new_tokens: int = 64
    repeats: int = 5
    warmup: int = 1

    def __post_init__(self) -> None:
        for name, low in (("prompt_tokens", 1), ("new_tokens", 1), ("repeats", 1), ("warmup", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise InvalidArgument(f"{name}: got {value!r}; expected an integer of at least {low}")


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Medians over the repeats, in tokens per second."""

    decode: float
    prefill: float

    def to_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models timed in turns.

    Attributes:
        dense, compressed: the medians of each.
        decode_ratio, prefill_ratio: compressed over dense, the median over pairs of neighbouring
            runs; above 1 the compressed model is faster.
    """

    dense: Throughput
    compressed: Throughput
    decode_ratio: float
    prefill_ratio: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def measure(model: nn.Module, workload: Workload | None = None) -> Throughput:
    """Time one model (a transformers causal language model in eval mode)."""
    workload = workload or Workload()
    return _median([_run(model, workload) for _ in _rounds(workload, model)])


def compare(dense: nn.Module, compressed: nn.Module, workload: Workload | None = None) -> Comparison:
    """Time two models in alternation, so that a machine that slows down hits both alike."""
    workload = workload or Workload()
    pairs = [
        (_run(dense, workload), _run(compressed, workload)) for _ in _rounds(workload, dense, compressed)
    ]
    return Comparison(
        dense=_median([first for first, _ in pairs]),
        compressed=_median([second for _, second in pairs]),
        decode_ratio=statistics.median(second.decode / first.decode for first, second in pairs),
        prefill_ratio=statistics.median(second.prefill / first.prefill for first, second in pairs),
    )


def generate_text(model: nn.Module, tokenizer: Any, prompt: str, max_new_tokens: int = 64) -> str:
    """The greedy continuation of ``prompt``, without the prompt.

    Raises:
        InvalidArgument: an empty prompt, no tokenizer, no token to generate, or no room in the
            model's context.
    """
    if tokenizer is None:
        raise InvalidArgument(
            "tokenizer: the model came without one; put its tokenizer files beside the weights"
        )
    if max_new_tokens < 1:
        raise InvalidArgument(f"max_new_tokens: got {max_new_tokens}; expected at least 1")
    device = next(model.parameters()).device
    encoded = tokenizer(prompt, return_tensors="pt").to(device)
    length = encoded["input_ids"].shape[1]
    if length == 0:
        raise InvalidArgument("prompt: it is empty; give some text to continue")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and length + max_new_tokens > longest:
        raise InvalidArgument(
            f"prompt: {length} tokens and {max_new_tokens} new ones exceed the {longest} that the "
            "model reads; shorten it"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        output = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
    return tokenizer.decode(output[0, length:], skip_special_tokens=True)


def _rounds(workload: Workload, *models: nn.Module) -> range:
    for _ in range(workload.warmup):
        for model in models:
            _run(model, workload)
    return range(workload.repeats)


@torch.inference_mode()
def _run(model: nn.Module, workload: Workload) -> Throughput:
    """One prefill and one decode."""
    prompt = _prompt(model, workload.prompt_tokens)
    start = _now(prompt)
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    prefilled = _now(prompt)
    for _ in range(workload.new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    end = _now(prompt)
    return Throughput(
        decode=workload.new_tokens / (end - prefilled),
        prefill=workload.prompt_tokens / (prefilled - start),
    )


def _prompt(model: nn.Module, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator)
    return ids.to(next(model.parameters()).device)


def _now(on: Tensor) -> float:
    if on.is_cuda:
        torch.cuda.synchronize(on.device)
    return time.perf_counter()


def _median(runs: list[Throughput]) -> Throughput:
    return Throughput(
        decode=statistics.median(run.decode for run in runs),
        prefill=statistics.median(run.prefill for run in runs),
    )
