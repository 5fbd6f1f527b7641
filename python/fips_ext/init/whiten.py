"""The square root of a Gram matrix, by damped eigendecomposition.

A Cholesky factor would do for the algebra, but fails on the singular Gram matrices that dead inputs, short
calibration and padding produce.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linalg import symmetric_eigen

DAMPING = 1e-4


def gram_root(gram: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """``S = (G + λ I)^{1/2}`` and ``S⁻¹``, symmetric, with ``λ = damping · mean eigenvalue``.

    Args:
        gram: symmetric positive semi-definite ``[..., d, d]``; a zero matrix gives the identity.
        damping: relative to the mean eigenvalue; positive.

    Returns:
        ``(S, S⁻¹)`` in float64.
    """
    values, vectors = symmetric_eigen(gram)
    values = values.clamp_min(0)
    mean = values.mean(-1, keepdim=True)
    values = torch.where(mean > 0, values + damping * mean, torch.ones_like(values))
    root = values.sqrt().unsqueeze(-2)
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
