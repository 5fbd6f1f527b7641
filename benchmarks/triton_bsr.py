"""torch's Triton product of a BSR matrix, with its launch parameters tuned for each shape.

    python benchmarks/triton_bsr.py

compiles every candidate of the shapes that are raced into Triton's cache on disk, in parallel, so that a
benchmark need not wait for it. Needs torch only.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
from collections.abc import Callable, Iterator

import torch
from gpu_timing import describe, warm_seconds
from torch import Tensor

Meta = dict[str, int]
Shape = tuple[int, int, int, tuple[int, int]]

SHAPES: tuple[Shape, ...] = (
    (4096, 2048, 8192, (64, 128)),
    (12608, 768, 3072, (64, 64)),
    (4096, 2048, 8192, (32, 32)),
    (4096, 2048, 8192, (16, 16)),
    (16, 2048, 14336, (64, 64)),
)
"""(tokens, r, n, (bk, bn)) of the products that are raced against it."""


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


def candidates(tokens: int) -> Iterator[Meta]:
    """A small grid of launch parameters."""
    splits = {max(1, tokens // width) for width in (64, 128) if tokens % width == 0 or tokens < width}
    for split, (warps, stages) in itertools.product(sorted(splits), ((4, 2), (4, 3), (8, 3))):
        yield {"SPLIT_N": split, "GROUP_SIZE_ROW": 4, "num_warps": warps, "num_stages": stages}


def product(bsr: Tensor, dense: Tensor, meta: Meta | None) -> Callable[[], Tensor]:
    """A runner of ``bsr @ dense``; on a CPU, where Triton does not run, through ``to_dense``."""
    if bsr.device.type == "cpu":
        return lambda: bsr.to_dense() @ dense
    from torch.sparse._triton_ops import bsr_dense_addmm

    empty = dense.new_zeros(bsr.shape[0], dense.shape[1])
    return lambda: bsr_dense_addmm(empty, bsr, dense, beta=0, meta=meta)


def tune(bsr: Tensor, dense: Tensor) -> Meta | None:
    """The fastest of :func:`candidates`."""
    if bsr.device.type == "cpu":
        return None
    best: tuple[float, Meta] | None = None
    failure: Exception | None = None
    for meta in candidates(dense.shape[1]):
        try:
            run = product(bsr, dense, meta)
            seconds = min(warm_seconds(run) for _ in range(3))
        except Exception as error:  # some launch parameters do not fit some blocks
            failure = error
            continue
        if best is None or seconds < best[0]:
            best = (seconds, meta)
    if best is None:
        raise failure or RuntimeError(f"no launch parameters for {dense.shape[1]} tokens")
    return best[1]


def compile_candidates(shape: Shape) -> str:
    """Runs every candidate of a shape once; what there is to say about it."""
    tokens, r, n, (bk, bn) = shape
    bsr = random_bsr(n, r, (bn, bk), 0.25, torch.bfloat16, "cuda")
    dense = torch.randn(r, tokens, device="cuda").bfloat16()
    failures = []
    for meta in candidates(tokens):
        try:
            product(bsr, dense, meta)()
            torch.cuda.synchronize()
        except Exception as error:
            failures.append(describe(error))
    return f"{shape}: {'; '.join(failures) or 'compiled'}"


def main() -> None:
    context = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(len(SHAPES), mp_context=context) as pool:
        for line in pool.map(compile_candidates, SHAPES):
            print(line, flush=True)


if __name__ == "__main__":
    main()
