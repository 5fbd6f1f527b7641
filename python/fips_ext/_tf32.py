"""torch's switch for TF32, handed to the CUDA kernels: it has no stable C interface."""

from __future__ import annotations

import ctypes

import torch


def _is_allowed() -> int:
    # It follows the older allow_tf32 and set_float32_matmul_precision, too, and never raises or warns.
    return int(torch.backends.cuda.matmul.fp32_precision == "tf32")


_query = ctypes.CFUNCTYPE(ctypes.c_int)(_is_allowed)  # called by the library as long as it lives


def register(path: str) -> None:
    """Let the library at ``path``, already loaded by torch, ask torch whether TF32 is allowed."""
    ctypes.CDLL(path).fips_set_tf32_query(_query)
