"""Small factorisation problems for the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from fips_ext.init import SliceProblem


def random_metric(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A well conditioned second moment with correlated features."""
    mix = torch.randn(width, width) / width**0.5 + torch.eye(width)
    return (mix @ mix.t()).to(dtype)


def random_slice(width: int, hidden: int, metric: bool = True, dtype: torch.dtype = torch.float32):
    weight = torch.randn(width, hidden).to(dtype)
    columns = (torch.rand(hidden) + 0.5).to(dtype)
    return SliceProblem(weight, random_metric(width, dtype) if metric else None, columns)


def gated_layer(width: int, hidden: int) -> dict[str, SliceProblem]:
    metric = random_metric(width)
    layer = {role: random_slice(width, hidden) for role in ("up", "gate")}
    for problem in layer.values():
        problem.metric = metric
    return {**layer, "down": random_slice(width, hidden, metric=False)}
