"""Gathering hidden neurons that need the same blocks in the same block columns.

Which neuron is which column of a slice is arbitrary, so columns may be grouped as suits the blocks: a block
is kept for all neurons of its column. For given blocks the best grouping is a balanced assignment; it is
solved by entropic optimal transport (Cuturi 2013), rounded greedily.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SINKHORN_STEPS = 10
_TEMPERATURES = (
    0.1,
    0.01,
    0.001,
    0.0001,
)  # of the deviation of the gains, falling: gains differ by magnitudes


def balanced_assignment(gains: Tensor, capacities: Tensor) -> Tensor:
    """Assign every item to a cluster so that the summed gain is large.

    Args:
        gains: ``[items, clusters]``.
        capacities: ``[clusters]``, int64; they sum to the number of items.

    Returns:
        the cluster of every item ``[items]``, int64; each cluster is filled to its capacity.
    """
    gains = gains.double()
    deviation = gains.std(correction=0)
    if deviation > 0:
        prices, target = torch.zeros_like(capacities, dtype=gains.dtype), capacities.log().to(gains.dtype)
        for temperature in _TEMPERATURES:
            scale = temperature * deviation
            for _ in range(_SINKHORN_STEPS):
                share = torch.logsumexp((gains + prices) / scale, 1, keepdim=True)
                prices = scale * (target - torch.logsumexp(gains / scale - share, 0))
        gains = gains + prices
    best = gains.argsort(dim=1, descending=True)
    ordered = gains.gather(1, best)
    # Those that lose most by not getting their first choice choose first.
    regret = ordered[:, 0] - ordered[:, min(1, ordered.shape[1] - 1)]
    room, preferred = capacities.tolist(), best.tolist()
    found = [0] * len(preferred)
    for item in regret.argsort(descending=True, stable=True).tolist():
        cluster = next(c for c in preferred[item] if room[c] > 0)
        room[cluster] -= 1
        found[item] = cluster
    return torch.tensor(found, dtype=torch.int64, device=gains.device)
