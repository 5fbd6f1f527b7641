"""A rotation of the base inside its span that makes the sparse factor carry more of the weights.

Any rotation of an orthonormal basis represents the weights equally well before masking, but not after.
Learning it is orthogonal dictionary learning: alternate the best mask for the rotation with the best rotation
for the mask, each in closed form (orthogonal Procrustes), so that the error never rises.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .linalg import polar

Project = Callable[[list[Tensor]], list[Tensor]]
"""Coefficients of every base, ``[rank, C]`` each, to the same with all but the kept entries set to zero."""


def rotate(targets: list[Tensor], bases: list[Tensor], project: Project, iterations: int) -> list[Tensor]:
    """Rotate orthonormal bases so that the projected coefficients of ``targets`` keep more energy.

    Args:
        targets: whitened columns ``A_b [d, C_b]`` of each base.
        bases: ``P_b [d, rank]`` with orthonormal columns.
        project: keeps the budgeted entries; sees all bases, because they compete for one budget.

    Returns:
        the new ``P_b``, orthonormal, in the dtype of ``bases``.
    """
    rotated = [p.to(a.dtype) for p, a in zip(bases, targets, strict=True)]
    for _ in range(iterations):
        kept = project([p.t() @ a for p, a in zip(rotated, targets, strict=True)])
        rotated = [polar(a @ x.t()) for a, x in zip(targets, kept, strict=True)]
    return [p.to(start.dtype) for p, start in zip(rotated, bases, strict=True)]
