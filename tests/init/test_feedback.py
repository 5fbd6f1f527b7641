"""Rounding with feedback, against rounding alone and in the metric of the slice."""

from __future__ import annotations

import pytest
import torch

from fips_ext.init.feedback import round_with_feedback
from fips_ext.layout import BlockSparse
from fips_ext.quantise import bits_of

from .problems import random_slice


def problem_of(rows: int, metric: bool, identity: bool):
    """A slice over a base, its values and what is kept of them."""
    torch.manual_seed(0)
    problem = random_slice(24, 40, metric)
    if metric:  # strongly correlated inputs: there is something to make good
        mix = torch.randn(24, 4) @ torch.randn(4, 24)
        problem.metric = mix.t() @ mix / 24 + 0.05 * torch.eye(24)
    base = torch.randn(24, rows) / 24**0.5
    full = torch.cat([base, torch.eye(24)], 1) if identity else base
    mask = torch.rand(full.shape[1], 40) < 0.7
    v = torch.linalg.lstsq(full, problem.weight).solution * mask
    return problem, base, v, mask


def error(problem, base, identity, v, q) -> float:
    full = torch.cat([base, torch.eye(24)], 1) if identity else base
    change = full @ (v - q)
    return float((change * problem.apply_metric(change)).sum())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "identity"), [(0, True), (24, False), (16, True), (20, False)])
@pytest.mark.parametrize("block", [(16, 16), (32, 64)])
def test_is_a_slice_of_codes_that_errs_less(bits, rows, identity, block) -> None:
    problem, base, v, mask = problem_of(rows, True, identity)
    found, scales = round_with_feedback(problem, base, identity, v, mask, block, bits)
    assert not found[~mask].any()
    layout = BlockSparse.from_dense(found, block, "bitmap", mask)
    codes = layout.quantised(bits, scales)
    assert bits_of(codes.values) == bits
    torch.testing.assert_close(codes.to_dense(), found)
    plain = BlockSparse.from_dense(v, block, "bitmap", mask).quantised(bits).to_dense()
    alone = error(problem, base, identity, v, plain)
    assert error(problem, base, identity, v, found) < 0.8 * alone


def test_without_correlation_it_is_rounding_alone() -> None:
    problem, _, v, mask = problem_of(0, False, True)
    found, _ = round_with_feedback(problem, torch.zeros(24, 0), True, v, mask, (16, 16), 8)
    plain = BlockSparse.from_dense(v, (16, 16), "bitmap", mask).quantised(8).to_dense()
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_singular_metric_is_damped(bits) -> None:
    problem, base, v, mask = problem_of(24, True, False)
    problem.metric = torch.zeros(24, 24)
    found, scales = round_with_feedback(problem, base, False, v, mask, (16, 16), bits)
    assert bool(found.isfinite().all())
    assert bool(scales.isfinite().all())
