"""Gradients on a GPU against those of the dense MLP.

``sddmm``: the gradient of V on its stored blocks, against the whole product with the stored blocks gathered
from it or the others set to zero, whichever is faster. ``loss``: forward, reconstruction loss and the
gradients of all parameters, against the dense MLP's with autograd. ``memory_ratio`` is our peak memory over
the dense MLP's, both beyond what was live before the step (parameters and data): with the gradients that the
step returns, or without them, whichever is the worse for us.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from cpu_shapes import DenseMlp, SharedMlp
from gpu_shapes import (
    BATCH_TOKENS,
    PREFILL_TOKENS,
    TINY,
    Pattern,
    default_block,
    make_mlps,
    make_slice,
    shape_of,
)
from gpu_timing import Bench, check_close
from race import Row, measured
from torch import Tensor

from fips_ext import functional
from fips_ext.layout import to_blocks

RANK_SHARE = 0.5
GRADIENT_BOUND = 0.05  # of bfloat16 sums over thousands of tokens


@dataclasses.dataclass(frozen=True)
class Case:
    part: str
    model: str
    tokens: int
    density: float = 0.25
    block: tuple[int, int] | None = None
    quick: bool = False

    def keys(self) -> Row:
        return {
            "case": f"{self.part} {self.model}",
            "dtype": "bfloat16",
            "T": self.tokens,
            "density": self.density,
            "default_block": self.block is None,
        }


CASES = (
    Case("sddmm", "Llama-3-8B", PREFILL_TOKENS, 0.25, (128, 128), quick=True),
    Case("sddmm", "Llama-3-8B", PREFILL_TOKENS, 0.1, (128, 128), quick=True),
    Case("loss", "Llama-3-8B", PREFILL_TOKENS, quick=True),
    Case("sddmm", "Llama-3-8B", PREFILL_TOKENS, 0.25),
    Case("sddmm", "Llama-3-8B", PREFILL_TOKENS, 0.5, (128, 128)),
    Case("sddmm", "DeiT-B", BATCH_TOKENS["DeiT-B"]),
    Case("loss", "Gemma-2-2B", PREFILL_TOKENS),
    Case("loss", "DeiT-B", BATCH_TOKENS["DeiT-B"]),
    Case("loss", "Swin-L s1", BATCH_TOKENS["Swin-L s1"]),
)


def measure(bench: Bench, case: Case) -> Iterator[Row]:
    shape = shape_of(case.model, bench.dry_run)
    rank = int(shape.d * RANK_SHARE)
    pattern = Pattern(case.density, case.block or default_block(rank))
    tokens = TINY["tokens"] if bench.dry_run else case.tokens
    about = {"d": shape.d, "n": shape.n, "r": rank, "a": RANK_SHARE, **pattern.keys()}
    if case.part == "sddmm":
        yield about | sddmm(bench, rank, shape.n, tokens, pattern)
    else:
        mlps = make_mlps(shape, rank, pattern, torch.bfloat16, bench.device)
        yield about | training(bench, mlps.ours, mlps.dense, tokens)


# -- the gradient of V ---------------------------------------------------------------------------------------


def sddmm(bench: Bench, rows: int, cols: int, tokens: int, pattern: Pattern) -> Row:
    v = make_slice(rows, cols, pattern, torch.bfloat16, bench.device)
    a, b = bench.randn(tokens, rows), bench.randn(tokens, cols)
    column = torch.repeat_interleave(torch.arange(v.col_ptr.numel() - 1, device=a.device), v.col_ptr.diff())
    row = v.row_idx.long()
    kept = (v.with_values(torch.ones_like(v.values)).to_dense() != 0).to(a.dtype)

    def gathered() -> Tensor:
        return to_blocks(a.t() @ b, v.block)[column, row]

    def masked() -> Tensor:
        return (a.t() @ b).mul_(kept)

    ours = functional.block_sparse_sddmm(a, b, v)
    found = check_close(ours, gathered())
    runs = {
        "ours": lambda: functional.block_sparse_sddmm(a, b, v),
        "dense/gathered": gathered,
        "dense/masked": masked,
    }
    race = bench.race(runs)
    return race.row() | measured({"best_ratio": race.ratio("dense"), "difference": found})


# -- a training step -----------------------------------------------------------------------------------------


def our_step(mlp: SharedMlp, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    loss = functional.reconstruction_loss(x, target, 1 / target.numel(), **mlp.arguments())
    return torch.autograd.grad(loss, mlp.parameters())


def dense_step(mlp: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(F.mse_loss(mlp(x), target), mlp.parameters())


def training(bench: Bench, ours: SharedMlp, dense: DenseMlp, tokens: int) -> Row:
    x, target = (bench.randn(tokens, ours.base.shape[0]) for _ in range(2))
    for parameter in itertools.chain(ours.parameters(), dense.parameters()):
        parameter.requires_grad_()
    steps = {
        "ours": functools.partial(our_step, ours, x, target),
        "dense": functools.partial(dense_step, dense, x, target),
    }
    found = check_gradients(steps["ours"](), functools.partial(dense_step, ours, x, target)())
    race = bench.race(steps, grad=True)
    best = measured({"best_ratio": race.ratio("dense")})
    return race.row() | memory(bench, steps) | best | {"difference": found}


def check_gradients(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference to the gradients that autograd makes of our own ops."""
    return max(check_close(a, b, GRADIENT_BOUND) for a, b in zip(found, expected, strict=True))


def memory(bench: Bench, steps: dict[str, Callable[[], Sequence[Tensor]]]) -> Row:
    """Peak bytes of one step beyond what is live before it; of which ``gradient`` are what it returns."""
    if bench.dry_run:  # torch does not count a CPU's memory
        return {}
    peaks: dict[str, dict[str, int]] = {}
    for name, step in steps.items():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients = step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        peaks[name] = {"peak": peak, "gradient": sum(g.nbytes for g in gradients)}
        del gradients
    ours, dense = peaks["ours"], peaks["dense"]
    without = (ours["peak"] - ours["gradient"]) / (dense["peak"] - dense["gradient"])
    return {"memory": peaks, "memory_ratio": max(ours["peak"] / dense["peak"], without)}


def main(argv: Sequence[str] | None = None) -> int:
    bench = Bench(__doc__, "backward", 30.0, argv)
    for case in CASES:
        if case.quick or not bench.quick:
            bench.attempt(case.keys(), functools.partial(measure, bench, case))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
