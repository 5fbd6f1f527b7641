"""What a computation was given, as one hash: two runs may share their results only if these are equal."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import memory

_CHUNK = 2**24  # elements at a time: a strided or a device's tensor is copied


class Fingerprint:
    """SHA-256 over tensors and plain values, with their types and shapes."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, value: Any) -> Fingerprint:
        """A tensor, a mapping or sequence of such, or anything whose ``repr`` says what it is."""
        if isinstance(value, Tensor):
            self._add_tensor(value.detach())
        elif isinstance(value, Mapping):
            self._mark(f"mapping {len(value)}")
            for key, item in value.items():
                self.add(key).add(item)
        elif isinstance(value, list | tuple):
            self._mark(f"sequence {len(value)}")
            for item in value:
                self.add(item)
        else:
            self._mark(repr(value))
        return self

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def _mark(self, text: str) -> None:
        data = text.encode()
        self._hash.update(len(data).to_bytes(8, "little") + data)

    def _add_tensor(self, tensor: Tensor) -> None:
        self._mark(f"{tensor.dtype} {tuple(tensor.shape)}")
        if tensor.is_meta:
            return
        for part in tensor.reshape(-1).split(_CHUNK) if tensor.numel() else ():
            self._hash.update(part.cpu().contiguous().view(torch.uint8).numpy())
            memory.relax()


def of_model(model: nn.Module) -> str:
    """Of every tensor that a checkpoint of ``model`` stores."""
    return Fingerprint().add(model.state_dict()).hexdigest()
