"""Finding the MLPs of a model and putting :class:`~fips_ext.nn.SharedMLP` in their place."""

from .dense_mlp import AbsorbedLinear, DenseMLP
from .find import find_mlps

__all__ = ["AbsorbedLinear", "DenseMLP", "find_mlps"]
