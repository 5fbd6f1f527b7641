"""Which entries of V are kept.

Entries compete inside a pool: one output feature, the slices of one layer (every layer then keeps as many),
or those of the whole group. The last minimises the summed relative error, but a network does not lose what
its MLPs lose on average: layers whose outputs are easy to approximate in the mean starve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import from_blocks, to_blocks
from ..recipe import Pattern
from .problem import SliceProblem


def saliency(v: Tensor, base_energy: Tensor, columns: Tensor) -> Tensor:
    """What dropping each entry alone adds to the error: ``V_kj² · ‖S u_k‖² · c_j²``, ``[rows, n]``.

    Args:
        v: ``[rows, n]``.
        base_energy: ``‖S u_k‖² [rows]``.
        columns: ``c [n]``.
    """
    return v.square() * base_energy.unsqueeze(1) * columns.square()


def base_energy(problem: SliceProblem, base: Tensor, identity: bool) -> Tensor:
    """``‖S u_k‖²`` of every base vector, those of the identity part last: ``[rows]``."""
    energy = (base * problem.apply_metric(base)).sum(0).clamp_min(0)  # of a singular metric: rounding
    if not identity:
        return energy
    diagonal = torch.ones_like(problem.weight[:, 0]) if problem.metric is None else problem.metric.diagonal()
    return torch.cat([energy, diagonal])


def select_in_pools(scores: list[list[Tensor]], count: int, pattern: Pattern) -> list[list[Tensor]]:
    """Masks that keep ``count`` entries in all, as many in each pool; see :func:`select`.

    Args:
        scores: per pool, one ``[rows, n]`` per slice.
    """
    pools = len(scores)
    shares = [count // pools + (i < count % pools) for i in range(pools)]
    return [select(pool, share, pattern) for pool, share in zip(scores, shares, strict=True)]


def select_per_output(score: Tensor, count: int, axis: int) -> Tensor:
    """Mask ``[rows, n]`` that keeps the ``count`` largest scores, as many of each output feature.

    Args:
        axis: which axis of ``score`` numbers the output features.
    """
    score = score.movedim(axis, 0)
    outputs, inputs = score.shape
    shares = torch.full((outputs, 1), count // max(1, outputs), device=score.device)
    shares[: count % max(1, outputs)] += 1
    order = score.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask.scatter_(1, order, torch.arange(inputs, device=score.device) < shares)
    return mask.movedim(0, axis)


def select(scores: list[Tensor], count: int, pattern: Pattern) -> list[Tensor]:
    """Masks that keep the ``count`` largest scores over all slices of one pool together.

    Args:
        scores: one ``[rows, n]`` per slice, not negative.
        count: values to keep (``bitmap``) or blocks (``block``, ``dense``; a block scores the sum over it).

    Returns:
        one bool ``[rows, n]`` per slice.
    """
    grids = [units(s, pattern) for s in scores]
    kept = largest(torch.cat([g.flatten() for g in grids]), count)
    parts = [
        part.view(g.shape) for part, g in zip(kept.split([g.numel() for g in grids]), grids, strict=True)
    ]
    if pattern.kind == "bitmap":
        return parts
    bk, bn = pattern.block
    return [
        from_blocks(part[..., None, None].expand(*part.shape, bn, bk), *score.shape)
        for part, score in zip(parts, scores, strict=True)
    ]


def units(scores: Tensor, pattern: Pattern) -> Tensor:
    """The score of every unit that is kept or dropped as a whole: an entry, or a block (the sum over it)."""
    return scores if pattern.kind == "bitmap" else to_blocks(scores, pattern.block).sum((-2, -1))


def largest(scores: Tensor, count: int) -> Tensor:
    """Bool mask of exactly ``count`` largest entries of a flat tensor; among equals the first ones win."""
    total = scores.numel()
    if count >= total:
        return torch.ones_like(scores, dtype=torch.bool)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # kthvalue is a selection, several times faster than the sort behind topk.
    threshold = scores.kthvalue(total - count + 1).values
    kept = scores > threshold
    ties = (scores == threshold).nonzero().flatten()
    kept[ties[: count - int(kept.sum())]] = True
    return kept
