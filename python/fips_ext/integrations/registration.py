"""Makes transformers know compressed models, without importing it.

Importing transformers takes longer than everything else that ``import fips_ext`` does, and many who call the
ops never need it. So the quantizer is registered when transformers' own registry is imported, be it before or
after.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Register now if the registry is there, else as soon as it is."""
    if _REGISTRY in sys.modules:
        _add(sys.modules[_REGISTRY])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the registry as it would be found without it, and adds to it once it is there."""

    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            _add(module)

        spec.loader.exec_module = execute_and_add
        return spec


def _add(registry: ModuleType) -> None:
    from .quantizer import METHOD, FipsConfig, FipsQuantizer

    if METHOD not in registry.AUTO_QUANTIZER_MAPPING:
        registry.register_quantization_config(METHOD)(FipsConfig)
        registry.register_quantizer(METHOD)(FipsQuantizer)
