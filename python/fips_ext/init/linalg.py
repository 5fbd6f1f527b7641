"""Small dense decompositions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run LAPACK on one thread.

    At the widths of transformers its threads wait for each other more than they compute: on a busy machine an
    SVD of 576 × 576 takes 40 times as long on two threads as on one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, increasing, and eigenvectors of the symmetric part of ``[..., d, d]``, in float64."""
    matrix = matrix.double()
    with one_thread():
        return torch.linalg.eigh((matrix + matrix.mT) / 2)


def polar(matrix: Tensor) -> Tensor:
    """The orthonormal columns closest in angle to ``[d, r]``, ``r ≤ d``: ``P Qᵀ`` of its SVD ``P Σ Qᵀ``.

    In the dtype of ``matrix``.
    """
    with one_thread():
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right
