"""next_token_losses, and which models have one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fips_ext.errors import NumericalError
from fips_ext.train import next_token_losses

from ..tiny_models import CASES, build

pytestmark = pytest.mark.usefixtures("single_thread")
CPU = torch.device("cpu")


@pytest.mark.parametrize("form", ["ids", "dict", "padded"])
def test_of_every_token_but_the_first(form: str) -> None:
    model, x = build("llama")
    rows = slice(None, 6) if form == "padded" else slice(None)
    with torch.no_grad():
        logits = model(x).logits.double()[:, rows][:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, x[:, rows][:, 1:].flatten(), reduction="none")
    batch = x if form == "ids" else {"input_ids": x}
    if form == "padded":
        batch["attention_mask"] = torch.ones_like(x)
        batch["attention_mask"][:, 6:] = 0
    found = next_token_losses(model, [batch, batch], CPU, torch.float32)
    torch.testing.assert_close(found, torch.cat([expected, expected]), rtol=1e-4, atol=0)


def test_batches_follow_each_other() -> None:
    model, x = build("llama")
    parts = [next_token_losses(model, [p], CPU, torch.float32) for p in (x, x[:1, :4])]
    both = next_token_losses(model, [x, x[:1, :4]], CPU, torch.float32)
    assert both.shape == (25,)
    torch.testing.assert_close(both, torch.cat(parts))


@pytest.mark.parametrize("name", CASES)
def test_only_causal_models_predict(name: str) -> None:
    model, x = build(name)
    causal = CASES[name].inputs == "ids" and name != "bert"
    assert (next_token_losses(model, [x], CPU, torch.float32) is not None) == causal


def test_ids_of_32_bits() -> None:
    model, x = build("llama")
    expected = next_token_losses(model, [x], CPU, torch.float32)
    assert torch.equal(next_token_losses(model, [x.int()], CPU, torch.float32), expected)


def test_without_logits_for_each_id_there_is_none() -> None:
    model, x = build("llama")
    embedded = {"inputs_embeds": model.get_input_embeddings()(x)}
    assert next_token_losses(model, [embedded], CPU, torch.float32) is None


def test_in_eval_mode_and_back() -> None:
    model, x = build("llama")
    expected = next_token_losses(model, [x], CPU, torch.float32)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert torch.equal(next_token_losses(model, [x], CPU, torch.float32), expected)
    assert all(module.training for module in model.modules())


def test_nan_is_an_error() -> None:
    model, x = build("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(NumericalError, match="loss on the calibration data holds NaN"):
        next_token_losses(model, [x], CPU, torch.float32)
