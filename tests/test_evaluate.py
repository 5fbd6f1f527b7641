"""Perplexity against distributions whose perplexity is known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fips_ext.errors import InvalidArgument, NumericalError
from fips_ext.evaluate import perplexity

from .tiny_llama import tiny_llama


class Bigram(nn.Module):
    """Predicts the next token from the present one by a fixed table of logits ``[V, V]``."""

    def __init__(self, table: torch.Tensor, longest: int = 4096) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.config = SimpleNamespace(vocab_size=table.shape[0], max_position_embeddings=longest)

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


def random_windows(count: int, length: int, vocabulary: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count, length), generator=generator)


def test_uniform_model_has_the_size_of_the_vocabulary():
    result = perplexity(Bigram(torch.zeros(16, 16)), random_windows(3, 300))
    assert result.perplexity == pytest.approx(16, rel=1e-6)
    assert result.interval == pytest.approx((16, 16), rel=1e-6)
    assert (result.tokens, result.windows, result.context) == (3 * 299, 3, 300)


@pytest.mark.parametrize("length", [2, 128, 129, 130, 300])  # around the chunk of rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_float64_reference(length, dtype):
    table = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    windows = random_windows(5, length)
    log_probabilities = table.double().log_softmax(-1)
    scored = log_probabilities[windows[:, :-1], windows[:, 1:]]
    result = perplexity(Bigram(table), windows)
    assert result.perplexity == pytest.approx(math.exp(-scored.mean()), rel=1e-5)


def test_first_token_of_a_window_is_not_scored():
    model = Bigram(torch.randn(16, 16))
    windows = torch.full((1, 4), 3)
    expected = math.exp(-model.table.log_softmax(-1)[3, 3].item())
    assert perplexity(model, windows).perplexity == pytest.approx(expected, rel=1e-5)


def test_interval_is_reproducible_and_holds_the_value():
    model, windows = Bigram(torch.randn(16, 16) * 2), random_windows(20, 33)
    first, second = perplexity(model, windows), perplexity(model, windows)
    assert first == second
    low, high = first.interval
    assert low < first.perplexity < high


def test_restores_the_training_mode_and_reports_progress():
    model, seen = Bigram(torch.zeros(16, 16)).train(), []
    perplexity(model, random_windows(3, 8), lambda done, total: seen.append((done, total)))
    assert model.training
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_scores_a_transformers_model_as_its_own_loss():
    model, windows = tiny_llama(), random_windows(2, 40, vocabulary=256)
    with torch.no_grad():
        expected = model(input_ids=windows, labels=windows).loss.exp().item()
    assert perplexity(model, windows).perplexity == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), "expected int64 \\[N, T\\]"),
        (torch.zeros(2, 4), "expected int64 \\[N, T\\]"),
        (torch.zeros(0, 4, dtype=torch.int64), "at least one window"),
        (torch.zeros(2, 1, dtype=torch.int64), "at least one window"),
        (torch.zeros(2, 65, dtype=torch.int64), "at most 64"),
        (torch.full((2, 4), 16), "vocabulary has 16"),
        (torch.full((2, 4), -1), "vocabulary has 16"),
    ],
)
def test_refuses_windows(windows, message):
    with pytest.raises(InvalidArgument, match=message):
        perplexity(Bigram(torch.zeros(16, 16), longest=64), windows)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_names_the_window_whose_logits_are_not_finite(bad):
    table = torch.zeros(16, 16)
    table[7, 2] = bad
    windows = torch.full((3, 8), 1)
    windows[1, 3:5] = torch.tensor([7, 2])
    with pytest.raises(NumericalError, match="window 1"):
        perplexity(Bigram(table), windows)
