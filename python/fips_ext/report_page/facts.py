"""What the page shows, taken from a checkpoint and its model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import info
from ..layout import BlockSparse, grid_shape
from ..nn import SharedMLP, SparseFactor
from ..nn.mlp import shared_mlps

Grid = list[list[float]]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One MLP.

    Attributes:
        name: qualified.
        group: number of the base it uses.
        dense_bytes, nbytes: before and after; None where the checkpoint has no report.
        error_before, error_after: relative output errors before and after training; None likewise.
        density: stored values over slots, per role.
        fill: per role, stored values over slots of each block, ``[block rows][block columns]``.
    """

    name: str
    group: int
    dense_bytes: int | None
    nbytes: int | None
    error_before: float | None
    error_after: float | None
    density: dict[str, float]
    fill: dict[str, Grid]


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers over one base.

    Attributes:
        rank: stored base vectors; 0 where the base is the identity alone.
        identity: whether it has an identity part.
        spectrum: singular values of U over the largest, falling; empty without U.
        usage: per layer, stored values over slots of each block row of its slices: what it uses of the base.
    """

    rank: int
    identity: bool
    spectrum: list[float]
    usage: Grid


@dataclasses.dataclass(frozen=True)
class Latency:
    """Median milliseconds of one MLP for a number of tokens."""

    tokens: int
    dense: float
    compressed: float


@dataclasses.dataclass(frozen=True)
class Facts:
    """All of it.

    Attributes:
        title: of the page.
        info: see :func:`fips_ext.info`.
        layers, groups: in model order.
        latency: of the first MLP; empty if it was not measured.
        device: where it was measured.
        samples: ``(prompt, continuation)``.
    """

    title: str
    info: dict[str, Any]
    layers: list[Layer]
    groups: list[Group]
    latency: list[Latency]
    device: str
    samples: list[tuple[str, str]]


@torch.no_grad()
def collect(
    directory: str | Path,
    model: nn.Module,
    *,
    latency: list[Latency] | None = None,
    samples: list[tuple[str, str]] | None = None,
) -> Facts:
    """Look at a checkpoint.

    Args:
        directory: the checkpoint.
        model: what was loaded from it.
        latency, samples: measured by the caller, see :func:`~.latency.measure`.
    """
    facts = info(directory)
    known = {layer["name"]: layer for layer in (facts["report"] or {}).get("layers", [])}
    mlps = shared_mlps(model)
    owners: dict[int, int] = {}
    layers, members = [], []
    for name, mlp in mlps.items():
        number = owners.setdefault(id(mlp.base), len(owners))
        if number == len(members):
            members.append([])
        members[number].append(mlp)
        fill = {role: _fill(factor) for role, factor in mlp.factors().items()}
        seen = known.get(name, {})
        layers.append(
            Layer(
                name=name,
                group=number,
                dense_bytes=seen.get("dense_bytes"),
                nbytes=seen.get("nbytes"),
                error_before=seen.get("error_before"),
                error_after=seen.get("error_after"),
                density={role: factor.slice().density for role, factor in mlp.factors().items()},
                fill={role: grid.tolist() for role, grid in fill.items()},
            )
        )
    return Facts(
        title=Path(directory).resolve().name,
        info=facts,
        layers=layers,
        groups=[_group(group) for group in members],
        latency=latency or [],
        device=str(next(iter(mlps.values())).base.weight.device),
        samples=samples or [],
    )


def _group(mlps: list[SharedMLP]) -> Group:
    base = mlps[0].base
    spectrum: list[float] = []
    if base.rank:
        values = torch.linalg.svdvals(base.weight.float())
        spectrum = (values / values[0].clamp_min(torch.finfo(values.dtype).tiny)).tolist()
    usage = [torch.cat([_fill(f) for f in mlp.factors().values()], 1).mean(1).tolist() for mlp in mlps]
    return Group(base.rank, base.identity, spectrum, usage)


def _fill(factor: SparseFactor) -> Tensor:
    """Stored values over slots of each block, ``[block rows, block columns]``, float32."""
    layout: BlockSparse = factor.slice()
    grid = torch.zeros(grid_shape(layout.rows, layout.cols, layout.block))
    columns = torch.repeat_interleave(torch.arange(grid.shape[1]), layout.col_ptr.cpu().diff())
    stored = torch.ones(layout.num_blocks)
    if layout.mask is not None:
        bits = torch.arange(256, dtype=torch.uint8).view(-1, 1) >> torch.arange(8, dtype=torch.uint8) & 1
        counts = bits.sum(1).float()[layout.mask.cpu().long()]
        stored = counts.sum((1, 2)) / (layout.block[0] * layout.block[1])
    grid[layout.row_idx.cpu().long(), columns] = stored
    return grid
