"""Modules: a base owned once, sparse slices, and the MLP that joins them."""

from .base import SharedBase
from .factor import SparseFactor
from .mlp import SharedMLP, cache_dense

__all__ = ["SharedBase", "SharedMLP", "SparseFactor", "cache_dense"]
