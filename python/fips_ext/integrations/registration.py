"""Makes transformers know compressed models, without importing it.

Importing transformers takes longer than everything else that ``import fips_ext`` does, and many who call the
ops never need it. So the quantizer is registered when transformers' own registry is imported, be it before or
after.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import warnings
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Register now if the registry is there, and whenever it is imported."""
    registry = sys.modules.get(_REGISTRY)
    if hasattr(registry, "register_quantizer"):  # not one that another thread is still importing
        _add(registry)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the registry as the other finders do, and adds to it once it is there."""

    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name != _REGISTRY:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_add(module: ModuleType) -> None:
                execute(module)
                _add(module)

            spec.loader.exec_module = execute_and_add
        return spec


def _add(registry: ModuleType) -> None:
    try:
        from . import quantizer

        if not hasattr(quantizer, "attach"):  # it is being imported, and registers when it is done
            return
        if quantizer.METHOD not in registry.AUTO_QUANTIZER_MAPPING:
            registry.register_quantization_config(quantizer.METHOD)(quantizer.FipsConfig)
            registry.register_quantizer(quantizer.METHOD)(quantizer.FipsQuantizer)
    except Exception as error:  # whoever imports transformers must get it, whatever we cannot do with it
        warnings.warn(
            f"fips_ext: this transformers cannot load compressed models ({error}); install "
            "transformers>=5.0, or use fips_ext.from_pretrained",
            stacklevel=2,
        )
