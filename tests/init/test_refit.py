"""Refits against explicit least squares in float64."""

from __future__ import annotations

import pytest
import torch

from fips_ext.init import SliceProblem
from fips_ext.init.refit import refit_base, refit_values

from .problems import random_metric, random_slice

F64 = torch.float64


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("identity", [False, True])
def test_values_solve_each_column(metric: bool, identity: bool) -> None:
    problem = random_slice(8, 5, metric, F64)
    base = torch.randn(8, 4, dtype=F64)
    full = torch.cat([base, torch.eye(8, dtype=F64)], 1) if identity else base
    mask = torch.rand(full.shape[1], 5) < 0.4
    start = torch.randn(full.shape[1], 5, dtype=F64) * mask
    v = refit_values(problem, base, identity, start, mask, iterations=100)
    assert not v[~mask].any()
    g = torch.eye(8, dtype=F64) if problem.metric is None else problem.metric
    root = torch.linalg.cholesky(g).t()
    for j in range(5):
        kept = mask[:, j]
        if kept.any():
            best = torch.linalg.lstsq(root @ full[:, kept], root @ problem.weight[:, j]).solution
            torch.testing.assert_close(v[kept, j], best, rtol=1e-3, atol=1e-4)


def test_base_solves_the_normal_equations_of_different_metrics() -> None:
    slices = [random_slice(6, 9, metric, F64) for metric in (True, True, False)]
    values = [torch.randn(3, 9, dtype=F64) for _ in slices]
    base = refit_base(slices, torch.zeros(6, 3, dtype=F64), values, iterations=200)
    gradient = torch.zeros(6, 3, dtype=F64)
    scale = 0.0
    for problem, v in zip(slices, values, strict=True):
        weighted = v * problem.columns.square()
        gradient += problem.apply_metric((problem.weight - base @ v) @ weighted.t())
        scale += float(problem.apply_metric(problem.weight @ weighted.t()).norm())
    assert float(gradient.norm()) < 1e-4 * scale


@pytest.mark.parametrize("iterations", [1, 4, 12])
def test_no_iteration_makes_it_worse(iterations: int) -> None:
    slices = [random_slice(16, 40, metric) for metric in (True, False)]
    base, values = torch.randn(16, 8), [torch.randn(8, 40) for _ in slices]
    masks = [torch.rand(8, 40) < 0.5 for _ in slices]
    values = [v * m for v, m in zip(values, masks, strict=True)]

    def error(base, values) -> float:
        return sum(s.error(base @ v) for s, v in zip(slices, values, strict=True))

    start = error(base, values)
    refitted = [
        refit_values(s, base, False, v, m, iterations) for s, v, m in zip(slices, values, masks, strict=True)
    ]
    middle = error(base, refitted)
    assert middle <= start * (1 + 1e-5)
    assert error(refit_base(slices, base, refitted, iterations), refitted) <= middle * (1 + 1e-5)


def test_dead_rows_and_silent_slices_stay_finite() -> None:
    problem = random_slice(6, 5)
    problem.columns = torch.zeros(5)
    base = torch.zeros(6, 3)
    mask = torch.ones(3, 5, dtype=torch.bool)
    v = refit_values(problem, base, False, torch.zeros(3, 5), mask)
    assert v.isfinite().all()
    assert refit_base([problem], base, [v]).isfinite().all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_weights_of_few_directions_stay_finite(scale: float) -> None:
    """The start is exact, so there is nothing to gain but rounding."""
    base = torch.linalg.qr(torch.randn(16, 16))[0]
    v = torch.zeros(16, 40)
    v[:3] = torch.randn(3, 40) * scale
    problem = SliceProblem(base @ v, random_metric(16), torch.rand(40))
    mask = torch.rand(16, 40) < 0.5
    mask[:3] = True
    found = refit_values(problem, base, False, v, mask, iterations=50)
    torch.testing.assert_close(found, v, rtol=1e-3, atol=1e-4 * scale)
    refitted = refit_base([problem], base, [found], iterations=50)
    assert problem.error(refitted @ found) <= 1e-8 * problem.error(torch.zeros_like(problem.weight))
