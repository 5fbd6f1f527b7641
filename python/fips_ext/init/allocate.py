"""Dividing a model's stored values among its groups, so that the last one of each is worth the same.

Every unit (a value, or a block) has a score: what dropping it adds to the error. For a budget over all
groups, keeping the highest scores wherever they are is optimal; the threshold is the Lagrange multiplier.
Only a histogram of each group's scores is held, so that a group can be looked at, let go, and factored later.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..budget import Plan

_BINS_PER_OCTAVE, _LOW, _HIGH = 64, -150, 127  # of float32


@dataclasses.dataclass(frozen=True)
class ScoreCurve:
    """How many scores of a group lie in each bin ``[2^((i-1)/64), 2^(i/64))``, highest bin first."""

    counts: Tensor

    @classmethod
    def of(cls, scores: list[Tensor]) -> ScoreCurve:
        """Of scores, not negative; zeros are in the last bin."""
        bins = (_HIGH - _LOW) * _BINS_PER_OCTAVE
        counts = torch.zeros(bins, dtype=torch.int64)
        for score in scores:
            level = score.flatten().log2().clamp(_LOW, _HIGH - 1)
            index = ((_HIGH - level) * _BINS_PER_OCTAVE).long().clamp_max(bins - 1)
            counts += torch.bincount(index, minlength=bins).cpu()
        return cls(counts)


def allocate(plans: list[Plan], curves: list[ScoreCurve], least: list[int]) -> list[Plan]:
    """The same plans with other counts, as many in all, or a few fewer.

    Args:
        curves: scores of every unit of each group.
        least: the fewest units of each group; at most the count of its plan.
    """
    total = sum(plan.count for plan in plans)
    above = torch.stack([curve.counts for curve in curves]).cumsum(1)  # [groups, bins]
    low = torch.tensor(least).unsqueeze(1)
    kept = torch.maximum(above, low)
    fits = kept.sum(0) <= total
    last = int(fits.sum()) - 1  # kept increases with the bin
    if last < 0:
        return plans
    counts = kept[:, last]
    if last + 1 < kept.shape[1]:  # a part of the next bin, the same of every group
        rest = kept[:, last + 1] - counts
        counts = counts + (rest.double() * ((total - int(counts.sum())) / int(rest.sum()))).long()
    return [plan.with_count(count) for plan, count in zip(plans, counts.tolist(), strict=True)]
