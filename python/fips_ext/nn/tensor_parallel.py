"""Tensor-parallel inference: the hidden neurons of every MLP dealt out to the devices of a mesh.

Every device has the bases and some block columns of each slice. Hidden neurons do not see each other, so a
device computes its own from ``x U`` to ``h V_downᵀ Uᵀ``; the outputs are sums over the devices.

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module
    from fips_ext.nn import SharedMLPParallel

    mesh = init_device_mesh("cuda", (8,))
    parallelize_module(model, mesh, {"model.layers.*.mlp": SharedMLPParallel()})
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel.style import ParallelStyle

from ..errors import InvalidArgument
from ..layout import BlockSparse
from .factor import SparseFactor
from .mlp import SharedMLP


class SharedMLPParallel(ParallelStyle):
    """A plan of ``parallelize_module`` for a :class:`SharedMLP`, in place; input and output are replicated.

    Columns are dealt out so that every device stores about as much. For inference: there are no gradients.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, SharedMLP):
            raise InvalidArgument(f"module: got {type(module).__name__}; only a SharedMLP can be dealt out")
        if device_mesh.ndim != 1:
            raise InvalidArgument(f"device_mesh: got {device_mesh.ndim} dimensions; expected one")
        rank, size = device_mesh.get_local_rank(), device_mesh.size()
        slices = {role: factor.slice() for role, factor in module.factors().items()}
        edges = {v.block[1] for v in slices.values()}
        if len(edges) > 1:
            raise InvalidArgument(f"module: its blocks are {sorted(edges)} columns wide; all must be alike")
        bounds = dealt_out(list(slices.values()), size)
        start, stop = bounds[rank], bounds[rank + 1]
        for role, v in slices.items():
            setattr(module, role, SparseFactor(v.block_columns(start, stop)).requires_grad_(False))
        columns = slice(start * min(edges), stop * min(edges))
        for name in ("up_bias", "gate_bias"):
            if (bias := getattr(module, name)) is not None:
                setattr(module, name, nn.Parameter(bias.detach()[columns].clone(), requires_grad=False))
        if rank > 0:  # a sum over the devices must have it once
            module.down_bias = None
        module.dense_cache = None
        module.register_forward_hook(_summed_over(device_mesh))
        return module


def dealt_out(slices: list[BlockSparse], size: int) -> list[int]:
    """Bounds of ``size`` runs of block columns that store about as many blocks, at least one column each.

    Raises:
        InvalidArgument: there are fewer block columns.
    """
    counts = sum(v.col_ptr.diff().double() for v in slices).cpu()
    columns = counts.numel()
    if columns < size:
        raise InvalidArgument(
            f"device_mesh: {size} devices for an MLP of {columns} block columns; use at most as many devices"
        )
    before = torch.cat(
        [counts.new_zeros(1), (counts + 1e-3).cumsum(0)]
    )  # columns that store nothing count, too
    bounds = [0]
    for part in range(1, size):
        nearest = int((before - before[-1] * part / size).abs().argmin())
        bounds.append(min(max(nearest, bounds[-1] + 1), columns - (size - part)))
    return [*bounds, columns]


def _summed_over(mesh: DeviceMesh) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        partial = DTensor.from_local(output, mesh, [Partial()], run_check=False)
        return partial.redistribute(placements=[Replicate()]).to_local()

    return hook
