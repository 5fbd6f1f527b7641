"""A rotation of the base inside its span that makes the sparse factor carry more of the weights.

Any rotation of an orthonormal basis represents the weights equally well before masking, but not after.
Learning it is orthogonal dictionary learning: alternate the best mask for the rotation with the best rotation
for the mask, each in closed form (orthogonal Procrustes), so that the error never rises.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .. import memory
from .linalg import polar

Parts = list[Tensor]  # the columns of a matrix
Project = Callable[[list[Parts]], list[Parts]]
"""Coefficients of every base, ``[rank, C]`` each, to the same with all but the kept entries set to zero."""


def rotate(targets: list[Parts], bases: list[Tensor], project: Project, iterations: int) -> list[Tensor]:
    """Rotate orthonormal bases so that the projected coefficients of ``targets`` keep more energy.

    Args:
        targets: whitened columns ``A_b [d, C_b]`` of each base.
        bases: ``P_b [d, rank]`` with orthonormal columns.
        project: keeps the budgeted entries; sees all bases, because they compete for one budget.

    Returns:
        the new ``P_b``, orthonormal, in the dtype of ``bases``.
    """
    rotated = [p.to(parts[0].dtype) for p, parts in zip(bases, targets, strict=True)]
    for _ in range(iterations):
        kept = project([_coefficients(p, parts) for p, parts in zip(rotated, targets, strict=True)])
        rotated = [polar(_product(parts, x)) for parts, x in zip(targets, kept, strict=True)]
    return [p.to(start.dtype) for p, start in zip(rotated, bases, strict=True)]


def _coefficients(base: Tensor, parts: Parts) -> Parts:
    """``Pᵀ A``."""
    found = []
    for part in parts:
        found.append(memory.keep(base.t() @ part))
        memory.relax()
    return found


def _product(parts: Parts, others: Parts) -> Tensor:
    """``A Xᵀ``."""
    first, *rest = zip(parts, others, strict=True)
    total = first[0] @ first[1].t()
    for a, x in rest:
        total += a @ x.t()
        memory.relax()
    return total
