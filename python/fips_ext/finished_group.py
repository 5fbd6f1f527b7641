"""A group of MLPs that is compressed but not yet rounded, as tensors and a JSON document."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import memory
from ._structure import describe, rebuild
from .distributed import Team
from .nn import SharedMLP, SparseFactor
from .nn.factor import Rounding


@dataclasses.dataclass
class FinishedGroup:
    """What a group has become.

    Attributes:
        names: of its MLPs in the model.
        mlps: float32.
        before, after: errors as in :class:`~.report.LayerReport`; None without data.
        seconds: that it took.
    """

    names: list[str]
    mlps: list[SharedMLP]
    before: list[float] | None
    after: list[float] | None
    seconds: float

    def encode(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors on the host, and what they do not say."""
        holder = nn.ModuleList(self.mlps)
        with _without_rounding(holder) as roundings:
            structure = describe(holder)
        tensors = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in holder.state_dict().items()
            if name not in structure["tied"]
        }
        for name, rounding in roundings.items():
            tensors[f"{name}.rounding"] = rounding.scales.cpu().contiguous()
        document = {
            "names": self.names,
            "before": self.before,
            "after": self.after,
            "seconds": self.seconds,
            "roundings": {name: rounding.bits for name, rounding in roundings.items()},
            "structure": structure,
        }
        return tensors, document

    @classmethod
    def decode(cls, tensors: dict[str, Tensor], document: dict[str, Any]) -> FinishedGroup:
        """Inverse of :meth:`encode`; the MLPs are made of ``tensors`` themselves.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError, CheckpointError: they do not fit.
        """
        scales = {name: tensors[f"{name}.rounding"] for name in document["roundings"]}
        structure = document["structure"]
        found = {name: tensor for name, tensor in tensors.items() if not name.endswith(".rounding")}
        found |= {alias: found[kept] for alias, kept in structure["tied"].items()}
        holder = nn.ModuleList(nn.Identity() for _ in document["names"])
        rebuild(holder, structure, "the group", replaces=False)
        holder.load_state_dict(found, strict=True, assign=True)
        for name, bits in document["roundings"].items():
            holder.get_submodule(name).rounding = Rounding(bits, scales[name])
        fields = (document[key] for key in ("before", "after", "seconds"))
        return cls(document["names"], list(holder), *fields)

    @classmethod
    def of_leader(cls, team: Team, group: FinishedGroup | None) -> FinishedGroup:
        """What the leader of ``team`` gives, for all of it; the others give None."""
        tensors, document = ({}, {}) if group is None else group.encode()
        kinds = {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()}
        said = json.loads(team.broadcast(json.dumps([kinds, document]).encode() if team.leads else None))
        kinds, document = said
        for name, (dtype, shape) in kinds.items():
            if not team.leads:
                tensors[name] = memory.empty(tuple(shape), getattr(torch, dtype))
            team.broadcast_into(tensors[name])
            memory.relax()
        return cls.decode(tensors, document)


@contextlib.contextmanager
def _without_rounding(holder: nn.Module) -> Iterator[dict[str, Rounding]]:
    """Within it no slice is about to become codes; yields by name what each was to be rounded to."""
    factors = {n: m for n, m in holder.named_modules() if isinstance(m, SparseFactor) and m.rounding}
    found = {name: factor.rounding for name, factor in factors.items()}
    try:
        for factor in factors.values():
            factor.rounding = None
        yield found
    finally:
        for name, factor in factors.items():
            factor.rounding = found[name]
