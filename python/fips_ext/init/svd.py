"""The best dense base of a group in its metric (arXiv 2411.09816, and whitened as in SVD-LLM)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import memory
from .linalg import symmetric_eigen
from .problem import SliceProblem, pooled_metric
from .whiten import gram_root


def leading_vectors(parts: list[Tensor], rank: int) -> Tensor:
    """The ``rank`` leading left singular vectors ``[d, rank]`` of ``[d, C]``, by energy, float64.

    From the ``d × d`` Gram matrix: for wide matrices that costs far less than an SVD. Its error, a relative
    √eps of float64, is irrelevant for trained weights.

    Args:
        parts: the columns of the matrix.
    """
    width = parts[0].shape[0]
    gram = torch.zeros(width, width, dtype=torch.float64, device=parts[0].device)
    for part in parts:
        for columns in memory.column_chunks(part):
            matrix = part[:, columns].double()
            gram += matrix @ matrix.mT
        memory.relax()
    _, vectors = symmetric_eigen(gram)
    return vectors.flip(-1)[:, :rank]


def whitened_columns(slices: list[SliceProblem], root: Tensor) -> list[Tensor]:
    """``[S W_1 diag(c_1) | S W_2 diag(c_2) | …]``, float32, in parts ``[d, C]`` of several slices each."""
    root = root.float()
    largest = slices[0].weight.numel()
    together = max(1, memory.CHUNK // max(1, largest))
    parts = []
    for start in range(0, len(slices), together):
        columns = [root @ (s.weight * s.columns) for s in slices[start : start + together]]
        parts.append(memory.keep(torch.cat(columns, 1)))
        memory.relax()
    return parts


def shared_basis(slices: list[SliceProblem], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading whitened directions of a base over ``slices`` (normalised), and the root of their metric.

    ``U = S⁻¹ P`` and ``V_i = Pᵀ S W_i`` minimise the pooled error over all ``U V`` of this rank; since
    ``UᵀS²U = I``, dropping the smallest weighted entries of V is then the best mask for this U.

    Returns:
        ``(P [d, rank], S [d, d], S⁻¹ [d, d])``, float64.
    """
    root, inverse = gram_root(pooled_metric(slices))
    root, inverse = memory.keep(root), memory.keep(inverse)
    return leading_vectors(whitened_columns(slices, root), rank), root, inverse
