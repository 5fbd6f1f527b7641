"""torch's Triton product of a BSR matrix, with its launch parameters tuned for each shape."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from gpu_timing import warm_seconds
from torch import Tensor

Meta = dict[str, int]


def random_bsr(
    rows: int, cols: int, block: tuple[int, int], density: float, dtype: torch.dtype, device: str
) -> Tensor:
    """A ``[rows, cols]`` BSR matrix with the same number of stored blocks in every block row."""
    per_row = max(1, round(density * cols / block[1]))
    grid = rows // block[0]
    order = torch.rand(grid, cols // block[1], device=device).argsort(1)[:, :per_row].sort(1).values
    crow = torch.arange(grid + 1, device=device, dtype=torch.int32) * per_row
    values = torch.randn(grid * per_row, *block, device=device).to(dtype)
    return torch.sparse_bsr_tensor(crow, order.flatten().int(), values, size=(rows, cols))


def product(bsr: Tensor, dense: Tensor, meta: Meta | None) -> Callable[[], Tensor]:
    """A runner of ``bsr @ dense``; on a CPU, where Triton does not run, through ``to_dense``."""
    if bsr.device.type == "cpu":
        return lambda: bsr.to_dense() @ dense
    from torch.sparse._triton_ops import bsr_dense_addmm

    empty = dense.new_zeros(bsr.shape[0], dense.shape[1])
    return lambda: bsr_dense_addmm(empty, bsr, dense, beta=0, meta=meta)


def tune(bsr: Tensor, dense: Tensor) -> Meta | None:
    """The fastest of a small grid of launch parameters."""
    if bsr.device.type == "cpu":
        return None
    tokens = dense.shape[1]
    best: tuple[float, Meta] | None = None
    failure: Exception | None = None
    for width, (warps, stages) in itertools.product((64, 128, 256), ((4, 2), (4, 3), (8, 3))):
        if tokens > width and tokens % width:
            continue
        splits = max(1, tokens // width)
        meta = {"SPLIT_N": splits, "GROUP_SIZE_ROW": 4, "num_warps": warps, "num_stages": stages}
        try:
            run = product(bsr, dense, meta)
            seconds = min(warm_seconds(run) for _ in range(3))
        except Exception as error:  # some launch parameters do not fit some blocks
            failure = error
            continue
        if best is None or seconds < best[0]:
            best = (seconds, meta)
    if best is None:
        raise failure or RuntimeError("no launch parameters fit")
    return best[1]
