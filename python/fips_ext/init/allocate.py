"""Dividing a model's stored values among its groups, so that the last one of each is worth the same.

Every unit (a value, or a block) has a score: what dropping it adds to the error. Scores add up inside a
group, but are second-order estimates: where much is dropped they say too little. So what a group costs is not
its error ``e`` but ``e + e² / (2 s)``: small errors count as they are, large ones more and more, and no group
is starved because its first losses look cheap. For a budget over all groups, keeping the units of highest
price, score times ``1 + e / s``, is optimal; the threshold is the Lagrange multiplier. Only a histogram of
each group's scores is held, so that a group can be looked at, let go, and factored later.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .. import memory
from ..budget import Plan

_BINS_PER_OCTAVE, _LOW, _HIGH = 64, -150, 127  # of float32
LAYER_SCALE = 0.02
"""The ``s`` above for each layer of a group, in nats: at this cost the next unit counts twice."""


@dataclasses.dataclass(frozen=True)
class ScoreCurve:
    """How many scores of a group lie in each bin ``[2^((i-1)/64), 2^(i/64))``, highest bin first."""

    counts: Tensor

    @classmethod
    def of(cls, scores: list[Tensor]) -> ScoreCurve:
        """Of scores, not negative; zeros are in the last bin."""
        bins = (_HIGH - _LOW) * _BINS_PER_OCTAVE
        counts = torch.zeros(bins, dtype=torch.int64)
        for part in (part for score in scores for part in score.flatten().split(memory.CHUNK)):
            level = part.log2().clamp(_LOW, _HIGH - 1)
            index = ((_HIGH - level) * _BINS_PER_OCTAVE).long().clamp_max(bins - 1)
            counts += torch.bincount(index, minlength=bins).cpu()
            memory.relax()
        return cls(counts)

    def dropped(self, count: int) -> float:
        """The sum of all scores but the ``count`` highest, up to the width of a bin."""
        above = self.counts.cumsum(0)
        rest = torch.minimum(self.counts, (above - count).clamp_min(0))
        return float((rest * _representative(len(self.counts))).sum())


def allocate(
    plans: list[Plan], curves: list[ScoreCurve], least: list[int], layer_scale: float = math.inf
) -> list[Plan]:
    """The same plans with other counts, as many in all, or a few fewer.

    Args:
        curves: scores of every unit of each group; half their sum is its error.
        least: the fewest units of each group; at most the count of its plan.
        layer_scale: ``s`` over the layers of a group, in the unit of the error; infinite: cost is error.
    """
    total = sum(plan.count for plan in plans)
    counts = torch.stack([curve.counts for curve in curves])  # [groups, bins]
    above, low = counts.cumsum(1), torch.tensor(least)
    prices = _prices(counts, torch.tensor([layer_scale * plan.shape.layers for plan in plans]))
    steps = prices.flatten().unique()  # increasing

    def kept(price: Tensor) -> Tensor:
        """Units of each group that cost at least ``price``."""
        bins = (prices >= price).sum(1)  # prices fall along the bins
        found = above.gather(1, (bins - 1).clamp_min(0).unsqueeze(1)).squeeze(1)
        return torch.maximum(torch.where(bins > 0, found, 0), low)

    first, last = 0, len(steps)  # the cheapest price that fits is in [first, last]
    while first < last:
        middle = (first + last) // 2
        if int(kept(steps[middle]).sum()) <= total:
            last = middle
        else:
            first = middle + 1
    if first == len(steps):
        return plans
    found = kept(steps[first])
    if first > 0:  # a part of the next bin, the same of every group whose bin it is
        rest = kept(steps[first - 1]) - found
        found = found + (rest.double() * ((total - int(found.sum())) / int(rest.sum()))).long()
    return [plan.with_count(count) for plan, count in zip(plans, found.tolist(), strict=True)]


def _prices(counts: Tensor, scale: Tensor) -> Tensor:
    """Of a unit of each bin ``[groups, bins]``, when all bins above it are kept; ``scale [groups]``."""
    score = _representative(counts.shape[1])
    energy = counts * score
    dropped = (energy.flip(1).cumsum(1).flip(1) - energy) / 2
    return score * (1 + dropped / scale.double().unsqueeze(1))


def _representative(bins: int) -> Tensor:
    """A score of each bin, float64; the last one, of zeros, has next to none."""
    return 2 ** (_HIGH - (torch.arange(bins, dtype=torch.float64) + 0.5) / _BINS_PER_OCTAVE)
