"""Closed-form least squares of one factor given the other, in the metric of each slice.

Both normal equations are solved by conjugate gradients: they need only cheap products, take every layer's own
metric (an explicit solution exists for one metric only), and start from the present factor, so that a few
iterations already improve it and none makes it worse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import memory
from .problem import SliceProblem

_RIDGE = 1e-6


def refit_values(
    problem: SliceProblem, base: Tensor, identity: bool, v: Tensor, mask: Tensor, iterations: int = 8
) -> Tensor:
    """The kept entries of V that minimise ``‖S (W − U V)‖²``, each column on its own.

    Args:
        base: ``U [d, r]``; with ``identity`` the rows of V are those of ``[U, I]``.
        v: start ``[rows, n]``, zero outside ``mask``.
        mask: bool ``[rows, n]``.

    Returns:
        V ``[rows, n]``, zero outside ``mask``.
    """
    full = with_identity(base, identity)
    weighted = problem.apply_metric(full)  # SᵀS U
    normal = full.t() @ weighted
    diagonal = normal.diagonal()
    ridge = _RIDGE * diagonal.mean() + torch.finfo(v.dtype).tiny
    preconditioner = (1 / (diagonal + ridge)).unsqueeze(1)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(0)  # one system per column

    def of_columns(part: slice) -> Tensor:
        keep, start = mask[:, part].to(v.dtype), v[:, part]

        def apply(x: Tensor) -> Tensor:
            return (normal @ x + ridge * x) * keep

        right = (weighted.t() @ problem.weight[:, part] + ridge * start) * keep
        return conjugate_gradients(apply, right, start, dot, lambda x: x * preconditioner, iterations)

    parts = memory.column_chunks(v)
    if len(parts) == 1:
        return of_columns(parts[0])
    refitted = memory.empty(v.shape, v.dtype, v.device)
    for part in parts:
        refitted[:, part] = of_columns(part)
        memory.relax()
    return refitted


def refit_base(
    slices: list[SliceProblem], base: Tensor, values: list[Tensor], iterations: int = 12
) -> Tensor:
    """The ridge-regularised U that minimises ``Σ_i ‖S_i (W_i − U V_i) diag(c_i)‖²``.

    Args:
        slices: the slices over this base.
        base: start ``[d, r]``, to which the ridge pulls.
        values: ``V_i``; with an identity part its last ``d`` rows are taken as they are.

    Returns:
        ``[d, r]``.
    """
    rank = base.shape[1]
    if rank == 0:
        return base
    grams: list[Tensor] = []
    right = torch.zeros_like(base)
    for problem, v in zip(slices, values, strict=True):
        squared = problem.columns.square()
        low = v[:rank] * squared
        grams.append(memory.keep(low @ v[:rank].t()))
        rest = problem.weight - v[rank:] if v.shape[0] > rank else problem.weight
        right += problem.apply_metric(rest @ low.t())
        memory.relax()
    # Jacobi on both sides: diag(SᵀS) over the rows, diag(V Vᵀ) over the columns.
    diagonal = torch.zeros_like(base)
    for problem, gram in zip(slices, grams, strict=True):
        rows = torch.ones_like(base[:, 0]) if problem.metric is None else problem.metric.diagonal()
        diagonal += torch.outer(rows, gram.diagonal())
    ridge = _RIDGE * diagonal.mean() + torch.finfo(base.dtype).tiny

    def apply(u: Tensor) -> Tensor:
        total = ridge * u
        for problem, gram in zip(slices, grams, strict=True):
            total = total + problem.apply_metric(u @ gram)
            memory.relax()
        return total

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum()

    return conjugate_gradients(
        apply, right + ridge * base, base, dot, lambda x: x / (diagonal + ridge), iterations
    )


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    start: Tensor,
    dot: Callable[[Tensor, Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    iterations: int,
) -> Tensor:
    """Preconditioned conjugate gradients; ``dot`` decides how many systems run side by side.

    A system whose residual is down to rounding stops: going on would amplify it without limit.
    """
    x = start
    residual = right - apply(x)
    direction = z = precondition(residual)
    energy = dot(residual, z)
    solved = torch.finfo(x.dtype).eps ** 2 * dot(right, precondition(right))
    for _ in range(iterations):
        image = apply(direction)
        curvature = dot(direction, image)
        goes_on = (energy > solved) & (curvature > 0)
        step = torch.where(goes_on, energy / curvature, 0)
        x = x + step * direction
        residual = residual - step * image
        z = precondition(residual)
        previous, energy = energy, dot(residual, z)
        direction = torch.where(goes_on, z + energy / previous * direction, 0)
    return x


def with_identity(base: Tensor, identity: bool) -> Tensor:
    """``U`` or ``[U, I]``."""
    if not identity:
        return base
    return torch.cat([base, torch.eye(base.shape[0], dtype=base.dtype, device=base.device)], 1)
