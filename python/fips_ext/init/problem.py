"""What an initialiser minimises: the weighted error of the slices over one base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from .. import memory


@dataclasses.dataclass
class SliceProblem:
    """One matrix ``W`` to be written as ``U · V``, and how much each part of the error matters.

    The error is ``‖S (W − U V) diag(c)‖²`` with ``SᵀS`` the metric. :mod:`fips_ext.train.teacher` scales
    ``c`` so that it is relative to the outputs of the matrix itself: the errors of all slices are then in one
    unit and may be ranked together.

    Attributes:
        weight: ``W [d, n]``, float32: transposed ``nn.Linear.weight`` of up and gate, that of down as it is.
        metric: second moment ``E[x xᵀ] [d, d]`` of the input of up and gate; None is the identity (down).
        columns: ``c [n]``.
    """

    weight: Tensor
    metric: Tensor | None
    columns: Tensor

    def normalised(self) -> SliceProblem:
        """The same error with a metric of trace ``d``, so that metrics of several slices can be averaged."""
        if self.metric is None:
            return self
        scale = self.metric.diagonal().mean()
        if not scale > 0:
            return dataclasses.replace(self, metric=None, columns=torch.zeros_like(self.columns))
        metric = memory.keep(self.metric / scale)
        return dataclasses.replace(self, metric=metric, columns=self.columns * scale.sqrt())

    def permuted(self, order: Tensor) -> SliceProblem:
        """The same problem with its columns in another order."""
        weight = memory.keep(self.weight[:, order])
        return dataclasses.replace(self, weight=weight, columns=self.columns[order])

    def apply_metric(self, matrix: Tensor) -> Tensor:
        """``SᵀS · matrix``."""
        return matrix if self.metric is None else self.metric @ matrix

    def error(self, product: Callable[[slice], Tensor] | Tensor) -> float:
        """``‖S (W − product) diag(c)‖²``.

        Args:
            product: ``[d, n]``, or what gives some of its columns.
        """
        total = 0.0
        for part in memory.column_chunks(self.weight):
            made = product[:, part] if isinstance(product, Tensor) else product(part)
            residual = (self.weight[:, part] - made) * self.columns[part]
            total += float((residual * self.apply_metric(residual)).sum())
        return total

    def energy(self) -> float:
        """The error of nothing in place of ``W``."""
        return self.error(lambda _part: self.weight.new_zeros(()))


def pooled_metric(slices: list[SliceProblem]) -> Tensor:
    """The mean metric ``[d, d]`` in float64, each slice by its share of the squared column weights.

    Slices should be :meth:`~SliceProblem.normalised`.
    """
    width = slices[0].weight.shape[0]
    identity = torch.eye(width, dtype=torch.float64, device=slices[0].weight.device)
    shares = torch.stack([s.columns.double().square().sum() for s in slices])
    if not float(shares.sum()) > 0:
        return identity
    shares = shares / shares.sum()
    pooled = torch.zeros_like(identity)
    for share, problem in zip(shares, slices, strict=True):
        pooled += share * (identity if problem.metric is None else problem.metric.double())
        memory.relax()
    return pooled
