"""What a computation was given, as one hash: two runs may share their results only if these are equal."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import memory

_PLAIN = (str, int, float, bool, bytes, type(None), torch.dtype, torch.device)
_CHUNK = 2**24  # elements at a time: a strided or a device's tensor is copied


class Fingerprint:
    """SHA-256 over tensors and plain values, with their types and shapes."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, value: Any) -> Fingerprint:
        """A tensor, array or plain value, a mapping or sequence of such; of anything else its type."""
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
        elif isinstance(value, np.ndarray):
            self._add_tensor(torch.from_numpy(np.ascontiguousarray(value)))
        elif isinstance(value, _PLAIN):
            self._mark(f"{type(value).__name__} {value!r}")
        else:
            self._mark(type(value).__qualname__)
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
    """Of what a model is, and of every tensor that a checkpoint of it stores."""
    config = getattr(model, "config", None)
    described = config.to_dict() if hasattr(config, "to_dict") else None
    if described is not None:  # but for where it came from, and by what it was written
        kept = sorted(described.items(), key=lambda item: str(item[0]))
        described = {k: v for k, v in kept if not str(k).startswith("_") and k != "transformers_version"}
    found = Fingerprint().add(type(model).__qualname__).add(described)
    return found.add(model.state_dict()).hexdigest()
