"""fips_ext: shared sparse factors for transformer MLPs, ``W_i ≈ U · V_i``, small and fast."""

from . import _library  # noqa: F401  registers torch.ops.fips
from .layout import BlockSparse
from .recipe import Recipe

__version__ = "0.1.0"
__all__ = ["BlockSparse", "Recipe", "__version__"]
