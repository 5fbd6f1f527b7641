"""fips_ext: shared sparse factors for transformer MLPs, ``W_i ≈ U · V_i``, small and fast.

Importing it registers ``torch.ops.fips.*``, and with transformers the ``quant_method`` ``fips``. The rest is
loaded when first used, so that a codebase that only calls the ops does not pay for transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from . import _library  # noqa: F401  registers torch.ops.fips
from .integrations.registration import register as _register_with_transformers
from .layout import BlockSparse
from .recipe import Recipe

if TYPE_CHECKING:
    from ._compress import compress
    from ._verify import verify
    from .checkpoint import from_pretrained, info, save_pretrained
    from .journal import Journal
    from .report import Report
    from .surgery import to_dense
    from .train import Calibration, calibrate

_register_with_transformers()

__version__ = "0.1.0"
__all__ = [
    "BlockSparse",
    "Calibration",
    "Journal",
    "Recipe",
    "Report",
    "__version__",
    "calibrate",
    "compress",
    "from_pretrained",
    "info",
    "save_pretrained",
    "to_dense",
    "verify",
]

_LAZY = {
    "Calibration": "train",
    "Journal": "journal",
    "Report": "report",
    "calibrate": "train",
    "compress": "_compress",
    "from_pretrained": "checkpoint",
    "info": "checkpoint",
    "save_pretrained": "checkpoint",
    "to_dense": "surgery",
    "verify": "_verify",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
