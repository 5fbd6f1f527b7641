"""The dense base of a group."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def base_label(rank: int, identity: bool) -> str:
    """``U<rank>``, ``I``, or both joined by a plus."""
    return "+".join([*([f"U{rank}"] if rank else []), *(["I"] if identity else [])])


class SharedBase(nn.Module):
    """``U [d, r]``, registered once by one owner and referred to by every layer of its group.

    With ``identity`` the base reads ``[U, I]``: the identity columns store nothing and multiply nothing;
    ``r = 0`` then leaves plain pruning.

    Args:
        weight: ``[d, r]``.
        identity: append ``d`` identity columns.
    """

    def __init__(self, weight: Tensor, identity: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.identity = identity

    @classmethod
    def empty(
        cls, width: int, rank: int, identity: bool = False, dtype: torch.dtype | None = None
    ) -> SharedBase:
        """An uninitialised base, to be filled by ``load_state_dict``."""
        return cls(torch.empty(width, rank, dtype=dtype), identity)

    @property
    def width(self) -> int:
        return self.weight.shape[0]

    @property
    def rank(self) -> int:
        """Stored columns ``r``."""
        return self.weight.shape[1]

    @property
    def rows(self) -> int:
        """Rows that a slice over this base has: ``r``, plus ``d`` with the identity part."""
        return self.rank + (self.width if self.identity else 0)

    def extra_repr(self) -> str:
        return f"width={self.width}, rank={self.rank}, identity={self.identity}"
