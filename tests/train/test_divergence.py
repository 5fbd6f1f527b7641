"""Divergence: what a compressed model loses against the dense one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fips_ext.errors import NumericalError
from fips_ext.train import Divergence

from .test_distill import damaged

pytestmark = pytest.mark.usefixtures("single_thread")


def logits(model, x, dense=None) -> torch.Tensor:
    with torch.no_grad():
        if dense is None:
            return model(x).logits.double()
        with dense[0].original(), dense[1].original(), dense[2].original():
            return model(x).logits.double()


@pytest.mark.parametrize("padded", [False, True])
def test_label_loss_is_what_is_lost_on_the_tokens_that_follow(padded: bool) -> None:
    model, x, dense, _ = damaged("llama")
    rows = slice(None, 6) if padded else slice(None)

    def loss(scores: torch.Tensor) -> torch.Tensor:
        kept = scores[:, rows][:, :-1]
        return F.cross_entropy(kept.flatten(0, 1), x[:, rows][:, 1:].flatten())

    expected = loss(logits(model, x)) - loss(logits(model, x, dense))
    batch = x
    if padded:
        mask = torch.ones_like(x)
        mask[:, 6:] = 0
        batch = {"input_ids": x, "attention_mask": mask}
    found = Divergence(model, dense, torch.float32).mean([batch], of_labels=True)
    assert found == pytest.approx(float(expected), rel=1e-3)


def test_models_without_a_next_token_diverge() -> None:
    for name in ("bert", "vit"):
        model, x, dense, _ = damaged(name)
        divergence = Divergence(model, dense, torch.float32)
        assert divergence.mean([x], of_labels=True) == divergence.mean([x]) > 0


@pytest.mark.parametrize("of_labels", [False, True])
def test_nan_is_an_error(of_labels: bool) -> None:
    model, x, dense, shared = damaged("llama")
    with torch.no_grad():
        shared[0].up.values[0, 0, 0] = float("nan")
    with pytest.raises(NumericalError, match="divergence from the dense model is nan"):
        Divergence(model, dense, torch.float32).mean([x], of_labels)
