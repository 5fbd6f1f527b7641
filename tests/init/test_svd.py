"""Shared bases against torch.linalg.svd."""

from __future__ import annotations

import torch

from fips_ext.init import SliceProblem
from fips_ext.init.svd import leading_vectors, shared_basis

from .problems import random_metric


def test_leading_vectors_span_those_of_the_svd() -> None:
    matrix = torch.randn(10, 40, dtype=torch.float64)
    left = torch.linalg.svd(matrix)[0][:, :4]
    ours = leading_vectors([matrix[:, :15], matrix[:, 15:]], 4)
    torch.testing.assert_close(ours @ ours.t(), left @ left.t())
    # In order of energy.
    energy = (ours.t() @ matrix).square().sum(1)
    assert bool((energy.diff() <= 0).all())


def test_whitened_basis_is_the_best_of_its_rank() -> None:
    metric = random_metric(10)
    slices = [SliceProblem(torch.randn(10, 20), metric, torch.rand(20) + 0.5) for _ in range(2)]
    slices = [s.normalised() for s in slices]
    p, root, inverse = shared_basis(slices, 4)
    error = sum(s.error((inverse @ p @ p.t() @ root).float() @ s.weight) for s in slices)
    target = torch.cat([root.float() @ s.weight * s.columns for s in slices], 1)
    best = torch.linalg.svdvals(target)[4:].square().sum()
    # The metric of the error is not damped, that of the basis is.
    torch.testing.assert_close(torch.tensor(error), best, rtol=1e-3, atol=0)


def test_rank_above_the_rank_of_the_weights() -> None:
    slices = [SliceProblem(torch.zeros(6, 8), None, torch.ones(8))]
    p, _, _ = shared_basis(slices, 6)
    torch.testing.assert_close(p.t() @ p, torch.eye(6, dtype=torch.float64))
