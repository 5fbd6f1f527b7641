"""Where the CUDA ops run: on a GPU as ``torch.ops.fips``, on any machine as ``torch.ops.fips_emulated``.

The latter are the same sources with their kernels emulated on CPU tensors (``csrc/torch/cuda_scope.h``).
"""

from __future__ import annotations

import dataclasses
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fips_ext import BlockSparse, _library, _tf32


@dataclasses.dataclass(frozen=True)
class CudaOps:
    """The ops and the device of the tensors they take."""

    ops: object
    device: str

    def put(self, value):
        """``value`` (a tensor, a slice, a container of them, or anything else) on the device."""
        if isinstance(value, Tensor):
            return value.to(self.device)
        if isinstance(value, BlockSparse):
            fields = {f.name: self.put(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return BlockSparse(**fields)
        if isinstance(value, dict):
            return {key: self.put(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.put(item) for item in value)
        return value


def reason_without_gpu() -> str | None:
    """Why the real CUDA ops cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible to torch"
    if not _library.available():
        return "fips_ext has no compiled op library"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fips::shared_mlp", "CUDA"):
        return "fips_ext was built without CUDA (FIPS_WITH_CUDA)"
    return None


@cache
def _load_emulated(path: str) -> None:
    if not Path(path).is_file():
        pytest.fail(
            f"FIPS_EMULATED_LIBRARY names {path}, which does not exist; build the target fips_emulated"
        )
    torch.ops.load_library(path)
    _tf32.register(path)


@pytest.fixture(params=["emulated", "cuda"])
def cuda(request) -> CudaOps:
    """Runs a test on emulated kernels and, where there is one, on a GPU."""
    if request.param == "cuda":
        reason = reason_without_gpu()
        if reason is not None:
            pytest.skip(reason)
        return CudaOps(torch.ops.fips, "cuda")
    path = os.environ.get("FIPS_EMULATED_LIBRARY")
    if path is None:
        pytest.skip("FIPS_EMULATED_LIBRARY is not set; make test sets it")
    _load_emulated(path)
    return CudaOps(torch.ops.fips_emulated, "cpu")
