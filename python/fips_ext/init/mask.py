"""Which entries of V are kept.

Entries compete inside a pool: one output feature, the slices of one layer (every layer then keeps as many),
or those of the whole group. The last minimises the summed relative error, but a network does not lose what
its MLPs lose on average: layers whose outputs are easy to approximate in the mean starve.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import memory
from ..layout import from_blocks, to_blocks
from ..recipe import Pattern
from .problem import SliceProblem

_DIGITS = 2**16


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
    parts = largest([units(s, pattern) for s in scores], count)
    if pattern.kind == "bitmap":
        return parts
    bk, bn = pattern.block
    masks = []
    for part, score in zip(parts, scores, strict=True):
        mask = from_blocks(part[..., None, None].expand(*part.shape, bn, bk), *score.shape)
        masks.append(memory.keep(mask))
        memory.relax()
    return masks


def units(scores: Tensor, pattern: Pattern) -> Tensor:
    """The score of every unit that is kept or dropped as a whole: an entry, or a block (the sum over it)."""
    return scores if pattern.kind == "bitmap" else to_blocks(scores, pattern.block).sum((-2, -1))


def largest(scores: list[Tensor], count: int) -> list[Tensor]:
    """Bool masks of exactly ``count`` largest entries of all tensors; among equals the first ones win.

    Args:
        scores: float32, not negative.
    """
    total = sum(score.numel() for score in scores)
    if count >= total or count == 0:
        return [torch.full_like(score, count > 0, dtype=torch.bool) for score in scores]
    threshold = _kth_largest(scores, count)
    masks = []
    for score in scores:
        masks.append(memory.keep((score > threshold).contiguous()))
        memory.relax()
    left = count - sum(int(mask.sum()) for mask in masks)
    for score, mask in zip(scores, masks, strict=True):
        ties = (score == threshold).flatten().nonzero().flatten()[:left]
        mask.view(-1)[ties] = True
        left -= ties.numel()
        memory.relax()
    return masks


def _kth_largest(scores: list[Tensor], k: int) -> float:
    """Exactly, by counting: the bits of floats that are not negative are in the order of the floats.

    First the upper half of the bits, then of those that agree in it the lower half: no more than a part of
    one tensor is held at a time, which neither a sort nor a selection could do.
    """
    upper, k = _digit(scores, k, lambda bits: bits >> 16)

    def lower_half(bits: Tensor) -> Tensor:
        return bits[bits >> 16 == upper] & 0xFFFF

    lower, _ = _digit(scores, k, lower_half)
    return float(torch.tensor((upper << 16) | lower, dtype=torch.int32).view(torch.float32))


def _digit(scores: list[Tensor], k: int, digits: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """The ``k``-th largest digit of all entries, and its place among those that have it, from 1."""
    counts = torch.zeros(_DIGITS, dtype=torch.int64)
    for score in scores:
        for part in score.flatten().split(memory.CHUNK):
            # abs: zero may have a sign.
            counts += torch.bincount(digits(part.abs().view(torch.int32)), minlength=_DIGITS).cpu()
        memory.relax()
    above = counts.flip(0).cumsum(0)
    place = int((above < k).sum())
    digit = _DIGITS - 1 - place
    return digit, k - int(above[place] - counts[digit])
