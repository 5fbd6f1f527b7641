"""The built library: one binary for every torch, CUDA code inside, loadable without a driver."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fips_ext
from fips_ext import _host


def library() -> Path:
    (path,) = Path(fips_ext.__file__).parent.glob("_C*.so")
    return path


def undefined_symbols(path: Path) -> list[str]:
    out = subprocess.run(
        ["nm", "-D", "--undefined-only", "--demangle", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.split(maxsplit=1)[1] for line in out.stdout.splitlines()]


def test_no_symbols_of_the_unstable_torch_abi():
    symbols = undefined_symbols(library())
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols), "nm saw no torch symbols at all"
    # Anywhere in the name: "typeinfo for c10::Error" and templates over at:: types count too.
    unstable = [s for s in symbols if re.search(r"\b(at|c10|torch|caffe2)::", s)]
    assert unstable == []


def test_torch_ops_are_registered():
    for name in (
        "block_sparse_mm",
        "block_sparse_sddmm",
        "shared_mlp",
        "shared_mlp_backward",
        "reconstruction_loss",
        "batched_rsvd",
        "batched_gram_eigh",
        "gram_update",
        "build_info",
    ):
        assert hasattr(torch.ops.fips, name)


def test_cuda_code_is_inside_when_a_compiler_was_there():
    info = json.loads(torch.ops.fips.build_info())
    if shutil.which("nvcc") is None:
        pytest.skip("no CUDA compiler on this machine")
    if os.environ.get("FIPS_WITH_CUDA") == "OFF":
        pytest.skip("built without CUDA on purpose (FIPS_WITH_CUDA=OFF)")
    assert info["cuda"] is True
    assert "90a" in info["cuda_archs"].split()


def test_no_dependency_on_a_cuda_runtime_or_driver():
    out = subprocess.run(["readelf", "-d", str(library())], capture_output=True, text=True, check=True)
    needed = [line for line in out.stdout.splitlines() if "NEEDED" in line]
    assert any("libtorch.so" in line for line in needed)
    assert not any(name in line for line in needed for name in ("libcudart", "libcuda.so", "libcublas"))


def test_one_version():
    version = json.loads(torch.ops.fips.build_info())["version"]
    assert version == fips_ext.__version__ == _host.version
    assert version == importlib.metadata.version("fips_ext")
