"""Decoding on a CPU: a few tokens, weights that no cache holds. Whole MLPs and single products.

    python benchmarks/bench_decode.py --quick --json decode.json

One timed call goes through as many distinct layers as it takes for the dense weights to reach 256 MB (at most
64), so that each layer's weights are cold when their turn comes; times are per layer. Layers share no base:
the stored bytes are the bytes that a token reads.

``time_over_bytes`` is the time over what the bytes alone would predict, ``ours_s / (byte_ratio · rival_s)``;
``byte_limit_share`` is its inverse.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from cpu_shapes import Setting, Shape, make_mlps, make_slice, shapes_of, stored_share
from cpu_timing import Goal, Session
from race import Row, dtype_name
from torch import Tensor

from fips_ext import functional

TIME_OVER_BYTES = Goal("G14", "time_over_bytes", 1.5, at_most=True)
BITMAP_SHARE = Goal("G16", "byte_limit_share", 0.6)
COLD_BYTES = 256e6
MAX_LAYERS = 64
OPS = ("shared_mlp", "block_sparse_mm")
DTYPES = (torch.bfloat16, torch.float32)
RANK_SHARE = 0.5

Layer = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    setting: Setting
    dtype: torch.dtype
    tokens: int

    def keys(self) -> Row:
        return {
            "case": f"{self.setting.shape.name} {self.op}",
            "dtype": dtype_name(self.dtype),
            "T": self.tokens,
            "op": self.op,
            **self.setting.keys(),
        }

    def goal(self) -> Goal | None:
        if self.setting.encoding == "block":
            return TIME_OVER_BYTES
        stored = self.setting.bits is None and self.setting.density == 0.5
        return BITMAP_SHARE if self.dtype == torch.bfloat16 and stored else None


def cases(shapes: Sequence[Shape], quick: bool) -> Iterator[Case]:
    for shape in shapes:
        slices = [Setting(shape), Setting(shape, 0.5, encoding="bitmap")]
        if not quick:
            slices += [Setting(shape, 0.5), Setting(shape, 0.25, encoding="bitmap")]
        slices += [
            Setting(shape, density, encoding=encoding, bits=bits)
            for bits in (8, 4)
            for density, encoding in ((0.25, "block"), (0.5, "bitmap"))
        ]
        for setting, dtype, op in itertools.product(slices, DTYPES, OPS):
            for tokens in (1, 8) if quick else (1, 8, 16):
                yield Case(op, setting, dtype, tokens)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Copies of one layer in distinct memory, ours and the rival's; bytes and FLOPs are of one layer."""

    ours: list[Layer]
    dense: list[Layer]
    nbytes: int
    dense_nbytes: int
    flops_per_token: float


@functools.lru_cache(maxsize=1)  # neighbouring cases share their weights
def stack_of(op: str, setting: Setting, dtype: torch.dtype, seed: int) -> Stack:
    generator = torch.Generator().manual_seed(seed)
    d, n = setting.shape.d, setting.shape.n
    ours: Layer
    dense: Layer
    if op == "shared_mlp":
        ours, dense = make_mlps(setting, int(d * RANK_SHARE), dtype, generator)
        nbytes, dense_nbytes, flops = ours.nbytes(), dense.nbytes(), ours.flops(1)
    else:
        v = make_slice(d, n, setting, dtype, generator)
        weight = torch.randn(n, d, generator=generator).to(dtype)
        ours = functools.partial(functional.block_sparse_mm, v=v)
        dense = functools.partial(F.linear, weight=weight)
        nbytes, dense_nbytes, flops = v.nbytes(), weight.nbytes, 2.0 * stored_share(v) * d * n
    layers = min(MAX_LAYERS, math.ceil(COLD_BYTES / dense_nbytes))
    return Stack(
        [copy.deepcopy(ours) for _ in range(layers)],  # values do not matter here, addresses do
        [copy.deepcopy(dense) for _ in range(layers)],
        nbytes,
        dense_nbytes,
        flops,
    )


def measure(session: Session, case: Case) -> Iterator[Row]:
    stack = stack_of(case.op, case.setting, case.dtype, session.args.seed)
    x = torch.randn(case.tokens, case.setting.shape.d).to(case.dtype)

    def through(layers: list[Layer]) -> None:
        for layer in layers:
            layer(x)

    race = session.race({"ours": lambda: through(stack.ours), "dense": lambda: through(stack.dense)})
    race = race.per_item(len(stack.ours))
    byte_ratio = stack.nbytes / stack.dense_nbytes
    limit_share = race.ratio("dense") * byte_ratio
    yield session.row(
        race,
        "dense",
        case.dtype,
        flops=case.tokens * stack.flops_per_token,
        nbytes=stack.nbytes,
        goal=case.goal(),
        layers=len(stack.ours),
        our_bytes=stack.nbytes,
        dense_bytes=stack.dense_nbytes,
        byte_ratio=byte_ratio,
        time_over_bytes=1 / limit_share,
        byte_limit_share=limit_share,
    )


def main() -> int:
    session = Session(__doc__)
    for case in cases(shapes_of(session.args.shapes, session.quick), session.quick):
        session.attempt(case.keys(), functools.partial(measure, session, case))
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
