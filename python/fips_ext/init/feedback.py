"""Rounding the values of a slice to codes so that later ones make good what earlier ones lost.

In the metric of the slice a column's error is ``(v − q)ᵀ H (v − q)`` with ``H = UᵀSᵀS U``. Rows are rounded
one after the other, and what rounding changed is compensated by the rows that are still free: the optimal
brain surgeon in a fixed order (GPTQ, Frantar et al. 2022, on the factor instead of the weights). A slot that
is not stored is rounded to zero like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import to_blocks
from ..quantise import Bits, choose_scales, decode, encode
from .linalg import one_thread, symmetric_eigen
from .problem import SliceProblem
from .refit import with_identity

_DAMPING = 1e-2  # of the mean of diag(H)


def round_with_feedback(
    problem: SliceProblem,
    base: Tensor,
    identity: bool,
    v: Tensor,
    mask: Tensor,
    block: tuple[int, int],
    bits: Bits,
) -> tuple[Tensor, Tensor]:
    """Values that are codes times scales.

    Args:
        base: ``U [d, r]``; with ``identity`` the rows of V are those of ``[U, I]``.
        v: ``[rows, n]``, zero outside ``mask``.
        block: ``(bk, bn)``; ``bk`` neighbouring rows of a column share a scale.

    Returns:
        ``(values [rows, n], scales)``, scales float16 ``[nnzb, bn]`` of the stored blocks, in their order.
    """
    edge = block[0]
    upper = _inverse_root(problem, with_identity(base, identity)).to(v.dtype)
    left, rounded = v.clone(), torch.zeros_like(v)
    scales = []
    for start in range(0, v.shape[0], edge):
        stop = min(start + edge, v.shape[0])
        rows = slice(start, stop)
        strip = left[rows]
        scale = choose_scales((strip * mask[rows]).t(), bits)
        errors = torch.empty_like(strip)
        for i in range(stop - start):
            row = decode(encode(strip[i].unsqueeze(1), scale, bits), scale).squeeze(1) * mask[start + i]
            weights = upper[start + i, start + i : stop]
            errors[i] = (strip[i] - row) / weights[0]
            strip[i:] -= torch.outer(weights, errors[i])
            rounded[start + i] = row
        left[stop:] -= upper[rows, stop:].t() @ errors
        scales.append(scale)
    grid = torch.stack(scales)  # [block rows, n]
    stored = to_blocks(mask, block).flatten(2).any(-1)
    return rounded, to_blocks(grid, (1, block[1])).squeeze(-1)[stored]


def _inverse_root(problem: SliceProblem, full: Tensor) -> Tensor:
    """The upper Cholesky factor of ``(H + damping)⁻¹``, float64."""
    hessian = (full.t() @ problem.apply_metric(full)).double()
    hessian = (hessian + hessian.t()) / 2
    mean = hessian.diagonal().mean()
    damping = _DAMPING * mean if mean > 0 else torch.ones_like(mean)
    hessian.diagonal().add_(damping)
    with one_thread():
        root, failed = torch.linalg.cholesky_ex(hessian)
        if int(failed) == 0:
            inverse = torch.cholesky_inverse(root)
        else:  # eigenvalues that rounding left below the damping
            values, vectors = symmetric_eigen(hessian)
            inverse = (vectors / values.clamp_min(damping)) @ vectors.t()
        return torch.linalg.cholesky(inverse, upper=True)
