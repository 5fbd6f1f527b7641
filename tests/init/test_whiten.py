"""gram_root against its definition, on the matrices that break a Cholesky factor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fips_ext.init.whiten import gram_root

D = 12


def grams() -> dict[str, Tensor]:
    x = torch.randn(40, D, dtype=torch.float64)
    thin = x[:3]
    return {
        "regular": x.t() @ x,
        "singular": thin.t() @ thin,
        "zero": torch.zeros(D, D, dtype=torch.float64),
        "constant": torch.ones(D, D, dtype=torch.float64),
        "slightly negative": thin.t() @ thin - 1e-9 * torch.eye(D, dtype=torch.float64),
        "huge": 1e20 * (x.t() @ x),
    }


@pytest.mark.parametrize("name", grams())
def test_is_the_damped_root_and_its_inverse(name: str) -> None:
    gram = grams()[name]
    root, inverse = gram_root(gram, 1e-4)
    mean = gram.diagonal().mean()
    eye = torch.eye(D, dtype=torch.float64)
    damped = gram + 1e-4 * mean * eye if mean > 0 else eye
    scale = damped.abs().max()
    torch.testing.assert_close(root @ root / scale, damped / scale, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(root @ inverse, eye, atol=1e-6, rtol=0)
    torch.testing.assert_close(root, root.t())


def test_batched_equals_one_by_one() -> None:
    stacked = torch.stack([grams()["regular"], grams()["zero"]])
    roots, _ = gram_root(stacked)
    torch.testing.assert_close(roots[1], gram_root(stacked[1])[0])
    torch.testing.assert_close(roots[0], gram_root(stacked[0])[0])
