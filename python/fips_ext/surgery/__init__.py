"""Finding the MLPs of a model and putting :class:`~fips_ext.nn.SharedMLP` in their place."""

from .dense_mlp import AbsorbedLinear, DenseMLP
from .find import find_mlps
from .undo import to_dense

__all__ = ["AbsorbedLinear", "DenseMLP", "find_mlps", "to_dense"]
