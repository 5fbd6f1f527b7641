"""The error that initialisers minimise."""

from __future__ import annotations

import torch

from fips_ext.init import SliceProblem
from fips_ext.init.problem import pooled_metric

from .problems import random_metric, random_slice


def test_error_is_the_output_error_on_the_tokens() -> None:
    x, w = torch.randn(50, 6), torch.randn(6, 9)
    c, approximation = torch.rand(9), torch.randn(6, 9)
    problem = SliceProblem(w, x.t() @ x / 50, c)
    expected = ((x @ (w - approximation)) * c).square().sum() / 50
    torch.testing.assert_close(torch.tensor(problem.error(approximation)), expected, rtol=1e-4, atol=0)


def test_normalising_changes_no_error() -> None:
    problem = random_slice(6, 9)
    problem.metric *= 17
    normal = problem.normalised()
    zero = torch.zeros(6, 9)
    torch.testing.assert_close(normal.metric.trace(), torch.tensor(6.0))
    torch.testing.assert_close(normal.error(zero), problem.error(zero), rtol=1e-5, atol=0)


def test_a_layer_that_sees_only_zeros_asks_for_nothing() -> None:
    problem = SliceProblem(torch.randn(6, 9), torch.zeros(6, 6), torch.ones(9)).normalised()
    assert problem.error(torch.zeros(6, 9)) == 0


def test_pooled_metric_weighs_by_the_columns() -> None:
    first, second = (SliceProblem(torch.randn(4, 5), random_metric(4), torch.ones(5)) for _ in range(2))
    second.columns = second.columns * 3**0.5
    expected = (first.metric + 3 * second.metric).double() / 4
    torch.testing.assert_close(pooled_metric([first, second]), expected)


def test_pooled_metric_of_silent_slices_is_the_identity() -> None:
    problem = SliceProblem(torch.randn(4, 5), random_metric(4), torch.zeros(5))
    torch.testing.assert_close(pooled_metric([problem]), torch.eye(4, dtype=torch.float64))
