"""The best dense base of a group in its metric (arXiv 2411.09816, and whitened as in SVD-LLM)."""

from __future__ import annotations

import torch
from torch import Tensor

from .linalg import symmetric_eigen
from .problem import SliceProblem, pooled_metric
from .whiten import gram_root


def leading_vectors(matrix: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading left singular vectors ``[d, rank]`` of ``[d, C]``, by energy, float64.

    From the ``d × d`` Gram matrix: for wide matrices that costs far less than an SVD. Its error, a relative
    √eps of float64, is irrelevant for trained weights.
    """
    matrix = matrix.double()
    _, vectors = symmetric_eigen(matrix @ matrix.mT)
    return vectors.flip(-1)[:, :rank]


def whitened_columns(slices: list[SliceProblem], root: Tensor) -> Tensor:
    """``[S W_1 diag(c_1) | S W_2 diag(c_2) | …]``: ``[d, C]``, float32."""
    root = root.float()
    return torch.cat([root @ (s.weight * s.columns) for s in slices], 1)


def shared_basis(slices: list[SliceProblem], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading whitened directions of a base over ``slices`` (normalised), and the root of their metric.

    ``U = S⁻¹ P`` and ``V_i = Pᵀ S W_i`` minimise the pooled error over all ``U V`` of this rank; since
    ``UᵀS²U = I``, dropping the smallest weighted entries of V is then the best mask for this U.

    Returns:
        ``(P [d, rank], S [d, d], S⁻¹ [d, d])``, float64.
    """
    root, inverse = gram_root(pooled_metric(slices))
    return leading_vectors(whitened_columns(slices, root), rank), root, inverse
