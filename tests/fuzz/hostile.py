"""Reads checkpoints of which one file is arbitrary bytes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from fips_ext import info, save_pretrained
from fips_ext.errors import CheckpointError, InvalidArgument

from ..checkpoint.toy import compressed_toy, load_toy

SHARD_BYTES = 2048


class HostileCheckpoint:
    """A checkpoint in which a file is replaced; every other is sound.

    The first byte of an input says which file; the rest is its content.

    Args:
        folder: for two checkpoints, in one file and in shards.
    """

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        model = compressed_toy()
        whole, parts = folder / "whole", folder / "parts"
        save_pretrained(model, whole)
        save_pretrained(model, parts, shard_bytes=SHARD_BYTES)
        shards = sorted(path.name for path in parts.glob("model-*.safetensors"))
        places = [
            (whole, "fips.json"),
            (whole, "model.safetensors"),
            (parts, "model.safetensors.index.json"),
            (parts, shards[0]),
        ]
        self._files = [place / name for place, name in places]
        self._sound = [path.read_bytes() for path in self._files]
        self.accepted = self.refused = 0

    def seeds(self) -> list[bytes]:
        """An input for each file, of what it holds."""
        return [bytes([i]) + content for i, content in enumerate(self._sound)]

    def read(self, data: bytes) -> None:
        """Load what the input says; an exception is a finding."""
        which = data[0] % len(self._files) if data else 0
        path = self._files[which]
        path.write_bytes(data[1:])
        try:
            info(path.parent)
            run(load_toy(path.parent))
            self.accepted += 1
        except (CheckpointError, InvalidArgument):
            self.refused += 1
        finally:
            path.write_bytes(self._sound[which])


def run(model: nn.Module) -> None:
    """Whatever was accepted computes."""
    with torch.no_grad():
        model(torch.randn(2, next(model.parameters()).shape[0]))


def mutations(seeds: list[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """Sound inputs with a few bytes changed, cut out, doubled or taken from another."""
    generator = random.Random(seed)
    for _ in range(count):
        data = bytearray(generator.choice(seeds))
        for _ in range(generator.choice((1, 1, 1, 2, 4, 16))):
            at = generator.randrange(1, max(2, len(data)))
            size = generator.choice((1, 1, 1, 2, 4, 8, 64))
            change = generator.randrange(6)
            if change == 0:
                data[at : at + size] = bytes(generator.randrange(256) for _ in range(size))
            elif change == 1:
                del data[at : at + size]
            elif change == 2:
                data[at:at] = data[at : at + size]
            elif change == 3:
                other = generator.choice(seeds)
                start = generator.randrange(1, len(other))
                data[at : at + size] = other[start : start + size]
            elif change == 4:
                data[at : at + 1] = generator.choice((b"0", b"9", b"-", b"e", b'"', b"[", b"{", b",", b"\0"))
            else:
                number = generator.choice((0, 1, -1, 2**31, 2**63 - 1, -(2**63), 10**30))
                data[at:at] = str(number).encode()
        yield bytes(data)
