"""Gradients on a CPU against those of the dense MLP.

    python benchmarks/bench_backward.py --quick --json backward.json

``sddmm``: the weight gradient on stored blocks, against the dense weight gradient with the stored blocks
gathered from it. ``mlp``: forward and backward through autograd, of x and all parameters. ``loss``: the
reconstruction loss and the gradients of all parameters, which our op makes in one pass. The goals on training
are goals of the GPU, so no row has one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from cpu_shapes import (
    DTYPES,
    DenseMlp,
    Setting,
    Shape,
    SharedMlp,
    make_mlps,
    make_slice,
    settings,
    shapes_of,
    stored_share,
)
from cpu_timing import Session
from race import Row, dtype_name
from torch import Tensor

from fips_ext import functional
from fips_ext.layout import to_blocks

PARTS = ("sddmm", "mlp", "loss")
RANK_SHARE = 0.5
PASSES = 3  # forward, and backward to the inputs and to the weights: the least work of a training step


@dataclasses.dataclass(frozen=True)
class Case:
    part: str
    setting: Setting
    dtype: torch.dtype
    tokens: int

    def keys(self) -> Row:
        return {
            "case": f"{self.setting.shape.name} {self.part}",
            "dtype": dtype_name(self.dtype),
            "T": self.tokens,
            "part": self.part,
            **self.setting.keys(),
        }

    def work(self) -> int:
        return self.tokens * self.setting.shape.d * self.setting.shape.n


def cases(shapes: Sequence[Shape], quick: bool) -> list[Case]:
    """The cheap ones first, so that a budget buys the most rows."""
    slices = [setting for setting in settings(shapes, quick) if setting.encoding == "block"]
    tokens = (197, 1576) if quick else (197, 1576, 4096)
    grid = [
        Case(part, setting, dtype, count)
        for setting, dtype, count, part in itertools.product(slices, DTYPES, tokens, PARTS)
    ]
    return sorted(grid, key=Case.work)


def measure(session: Session, case: Case) -> Iterator[Row]:
    if case.part == "sddmm":
        yield from measure_sddmm(session, case)
    else:
        yield from measure_training(session, case)


def measure_sddmm(session: Session, case: Case) -> Iterator[Row]:
    d, n = case.setting.shape.d, case.setting.shape.n
    generator = torch.Generator().manual_seed(session.args.seed)
    v = make_slice(d, n, case.setting, case.dtype, generator)
    a, b = (torch.randn(case.tokens, width).to(case.dtype) for width in (d, n))
    column = torch.repeat_interleave(torch.arange(v.col_ptr.numel() - 1), v.col_ptr.diff())
    row = v.row_idx.long()

    def dense() -> Tensor:
        return to_blocks(a.t() @ b, v.block)[column, row]

    race = session.race({"ours": lambda: functional.block_sparse_sddmm(a, b, v), "dense, gathered": dense})
    share = stored_share(v)
    flops = 2.0 * case.tokens * share * d * n
    nbytes = a.nbytes + b.nbytes + v.nbytes()
    e = share * race.ratio("dense, gathered")
    yield session.row(race, "dense, gathered", case.dtype, flops=flops, nbytes=nbytes, e=e)


@functools.lru_cache(maxsize=1)  # neighbouring cases share their weights
def weights_of(setting: Setting, dtype: torch.dtype, seed: int) -> tuple[SharedMlp, DenseMlp]:
    rank = int(setting.shape.d * RANK_SHARE)
    mlps = make_mlps(setting, rank, dtype, torch.Generator().manual_seed(seed))
    for parameter in itertools.chain(*(mlp.parameters() for mlp in mlps)):
        parameter.requires_grad_()
    return mlps


def measure_training(session: Session, case: Case) -> Iterator[Row]:
    shared, dense = weights_of(case.setting, case.dtype, session.args.seed)
    x, target = (torch.randn(case.tokens, case.setting.shape.d).to(case.dtype) for _ in range(2))
    steps = (mlp_step, mlp_step) if case.part == "mlp" else (fused_loss_step, dense_loss_step)
    runs = {
        "ours": functools.partial(steps[0], shared, x, target),
        "dense": functools.partial(steps[1], dense, x, target),
    }
    race = session.race(runs, grad=True)
    flops = PASSES * shared.flops(case.tokens)
    nbytes = 2 * shared.nbytes() + 4 * x.nbytes  # parameters and gradients; x, y and theirs
    yield session.row(race, "dense", case.dtype, flops=flops, nbytes=nbytes, a=RANK_SHARE)


def mlp_step(mlp: SharedMlp | DenseMlp, x: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(mlp(x), [x, *mlp.parameters()], grad_y)


def fused_loss_step(mlp: SharedMlp, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    loss = functional.reconstruction_loss(x, target, 1 / target.numel(), **mlp.arguments())
    return torch.autograd.grad(loss, mlp.parameters())


def dense_loss_step(mlp: DenseMlp, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(F.mse_loss(mlp(x), target), mlp.parameters())


def main() -> int:
    session = Session(__doc__)
    for case in cases(shapes_of(session.args.shapes, session.quick), session.quick):
        session.attempt(case.keys(), functools.partial(measure, session, case))
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
