"""The safetensors files of a folder: one, or several with an index, as transformers writes and reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import memory
from ._json import read_json
from .errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9

# Names of safetensors' dtypes that a model may hold, by torch's.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def write_tensors(tensors: dict[str, Tensor], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``tensors``, in files of about ``shard_bytes`` if they are larger together.

    Raises:
        OSError, SafetensorError: the disk does not take them.
    """
    shards: list[dict[str, Tensor]] = [{}]
    used = total = 0
    for name, tensor in tensors.items():
        if used + tensor.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used, total = used + tensor.nbytes, total + tensor.nbytes
    if len(shards) == 1:
        names = [WEIGHTS]
    else:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        # A view into a larger tensor would be written with all of it, or refused.
        whole = {
            key: t if _is_whole(t) else t.clone(memory_format=torch.contiguous_format)
            for key, t in shard.items()
        }
        save_file(whole, folder / name, metadata={"format": "pt"})
        memory.relax()
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        document = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(document, indent=1), encoding="utf-8")


def _is_whole(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


class TensorFiles:
    """The tensors of a folder, without loading them.

    Attributes:
        path: of the one file, or of the index: for messages.
        files: all of them.
        stored: by name, the file that holds it, its dtype (a name of safetensors) and its shape.

    Raises:
        CheckpointError: a file is missing or damaged, or the index does not fit.
    """

    def __init__(self, folder: Path) -> None:
        places = None
        self.path = folder / WEIGHTS
        if not self.path.is_file() and (folder / INDEX).is_file():
            self.path = folder / INDEX
            places = _read_index(self.path)
        self.files = [self.path] if places is None else sorted({folder / name for name in places.values()})
        self.stored: dict[str, tuple[Path, str, list[int]]] = {}
        for path in self.files:
            for name, header in _headers(path).items():
                if places is not None and places.get(name) != path.name:
                    raise CheckpointError(
                        f"{self.path}: {name} is in {path.name}, where the index does not have it; copy or "
                        "save the folder again"
                    )
                self.stored[name] = (path, *header)
        if places is not None and (lost := sorted(set(places) - set(self.stored))):
            raise CheckpointError(
                f"{self.path}: {lost[0]} is not in {places[lost[0]]}; copy or save the folder again"
            )

    def nbytes(self) -> int:
        """Of the files, their headers included."""
        return sum(path.stat().st_size for path in self.files)

    def sizes(self) -> dict[str, tuple[int, int]]:
        """By name, the bytes of each tensor and of one of its elements.

        Raises:
            CheckpointError: one is of a dtype that no model here has.
        """
        found = {}
        for name, (path, dtype, shape) in self.stored.items():
            if dtype not in _DTYPES:
                raise CheckpointError(f"{path}: {name} is {dtype}; allowed are {', '.join(_DTYPES)}")
            item = _DTYPES[dtype].itemsize
            found[name] = (math.prod(shape) * item, item)
        return found

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor on the host, file by file, mapped: copy what is to stay."""
        for path in self.files:
            try:
                with safe_open(path, framework="pt", device="cpu") as file:
                    for name in file.keys():  # noqa: SIM118 - not a dict
                        yield name, file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise unreadable(path, error) from error

    def map(self) -> dict[str, Tensor]:
        """Every tensor, mapped for as long as it is used; what is written to one is lost.

        Raises:
            CheckpointError: one is of a dtype that no model here has, or a file cannot be mapped.
        """
        self.sizes()
        return {name: tensor for path in self.files for name, tensor in map_tensors(path).items()}


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, mapped for as long as it is used; what is written to one is lost.

    Raises:
        CheckpointError: the file is missing or damaged, or cannot be mapped.
    """
    stored = _headers(path)  # sound, and all of them inside the file
    try:
        buffer = memory.map_file(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    start = 8 + int.from_bytes(buffer[:8], "little")
    header: dict[str, Any] = json.loads(buffer[8:start])
    found = {}
    for name, (kind, shape) in stored.items():
        count, offset = math.prod(shape), start + header[name]["data_offsets"][0]
        found[name] = _from_buffer(buffer, _DTYPES[kind], count, offset).view(shape)
    return found


def _from_buffer(buffer: Any, dtype: torch.dtype, count: int, offset: int) -> Tensor:
    if count == 0:
        return torch.empty(0, dtype=dtype)
    if offset % dtype.itemsize == 0:
        return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset)
    raw = torch.frombuffer(buffer, dtype=torch.uint8, count=count * dtype.itemsize, offset=offset)
    return raw.clone().view(dtype)


def _read_index(path: Path) -> dict[str, str]:
    """The file of every tensor; plain names only, so that no index reaches outside its folder."""
    try:
        places = read_json(path)["weight_map"]
        if not isinstance(places, dict) or not places:
            raise ValueError("weight_map is no object with entries")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(path, error) from error
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: {name!r} is not the name of a .safetensors file beside it; copy or save it again"
            )
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path}: {name} is missing; copy the whole folder again")
    return places


def _headers(path: Path) -> dict[str, tuple[str, list[int]]]:
    """By name, dtype and shape."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {name: (header.get_dtype(), list(header.get_shape())) for name, header in found.items()}
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: truncated or damaged ({error}); copy or save it again")
