"""Loads the compiled op library and answers, when an op is called, why it might be missing."""

from __future__ import annotations

from pathlib import Path

import torch

_PATTERN = "_C*.so"
_load_error: str | None = None


def load() -> None:
    """Register ``torch.ops.fips.*``. Never raises: :func:`require` explains a failure at the first call."""
    global _load_error
    found = sorted(Path(__file__).parent.glob(_PATTERN))
    if not found:
        _load_error = (
            f"the compiled library {_PATTERN} is not beside {Path(__file__).name}; "
            "install the package with 'pip install .' (a source tree alone has no kernels)"
        )
        return
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        _load_error = f"{found[0].name} does not load with torch {torch.__version__}: {error}"
        return
    from . import _autocast, _autograd, _fake, _tf32

    _tf32.register(str(found[0]))
    for rules in (_fake, _autograd, _autocast):
        rules.register()


def available() -> bool:
    """Whether ``torch.ops.fips.*`` is registered."""
    return _load_error is None


def require() -> None:
    """Raise ``ImportError`` with the reason if the op library is missing."""
    if _load_error is not None:
        raise ImportError(f"fips_ext: {_load_error}")


load()
