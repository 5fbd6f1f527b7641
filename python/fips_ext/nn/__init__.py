"""Modules: a base owned once, sparse slices, and the MLP that joins them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import SharedBase
from .factor import SparseFactor
from .mlp import SharedMLP, cache_dense

if TYPE_CHECKING:
    from .tensor_parallel import SharedMLPParallel

__all__ = ["SharedBase", "SharedMLP", "SharedMLPParallel", "SparseFactor", "cache_dense"]


def __getattr__(name: str):
    if name != "SharedMLPParallel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .tensor_parallel import SharedMLPParallel  # torch.distributed.tensor takes a second to load

    return SharedMLPParallel
