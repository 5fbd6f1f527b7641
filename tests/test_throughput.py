"""Timing runs exactly the work it is said to run; generation is greedy."""

from __future__ import annotations

import pytest
import torch

from fips_ext.errors import InvalidArgument
from fips_ext.throughput import Workload, compare, generate_text, measure

from .tiny_llama import byte_tokenizer, tiny_llama

WORKLOAD = Workload(prompt_tokens=6, new_tokens=3, repeats=2, warmup=1)


def lengths_seen(model) -> list[int]:
    """Tokens of each forward pass from now on."""
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return seen


def test_measure_runs_prefill_and_then_single_tokens():
    model = tiny_llama()
    seen = lengths_seen(model)
    speed = measure(model, WORKLOAD)
    assert seen == [6, 1, 1, 1] * 3
    assert speed.decode > 0
    assert speed.prefill > 0


def test_compare_alternates():
    order: list[str] = []
    models = {name: tiny_llama() for name in ("dense", "compressed")}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    result = compare(*models.values(), WORKLOAD)
    assert order == (["dense"] * 4 + ["compressed"] * 4) * 3
    assert result.decode_ratio > 0
    assert result.prefill_ratio > 0


@pytest.mark.parametrize("field", ["prompt_tokens", "new_tokens", "repeats"])
def test_workload_refuses(field):
    with pytest.raises(InvalidArgument, match=field):
        Workload(**{field: 0})


def test_generation_is_greedy():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    ids = tokenizer("abc", return_tensors="pt")["input_ids"]
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert generate_text(model, tokenizer, "abc", 5) == tokenizer.decode(ids[0, 3:])


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "message"),
    [("", 4, "prompt: it is empty"), ("abc", 0, "max_new_tokens"), ("abc", 510, "exceed the 512")],
)
def test_generation_refuses(prompt, new_tokens, message):
    with pytest.raises(InvalidArgument, match=message):
        generate_text(tiny_llama(), byte_tokenizer(), prompt, new_tokens)


def test_generation_needs_a_tokenizer():
    with pytest.raises(InvalidArgument, match="tokenizer"):
        generate_text(tiny_llama(), None, "abc")
