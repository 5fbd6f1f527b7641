"""The whole MLP on a GPU against the dense MLP and against its own chain with V filled up with zeros.

    python benchmarks/bench_shared_mlp_cuda.py --out mlp.json

``a`` is the rank over the width, r / d. ``best_ratio`` is the ratio over the fastest rival in each round.
Rows named ``cached`` are those of a module that keeps dense copies (``fips_ext.nn.cache_dense``), where it
would; ``may_cache`` rows hold where such copies are allowed: the cached ones, and those of cases that have
none.

Up to 64 tokens are decoding: graph replays through as many distinct layers as keep the weights out of the L2,
times per layer, and ``eager_seconds`` without graphs. ``copy_share`` is the rate of the stored bytes over the
copy bandwidth measured in the same run; ``byte_limit_share`` is the ratio over ``dense`` as a share of what
the bytes alone allow.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from gpu_shapes import (
    BATCH_TOKENS,
    PREFILL_TOKENS,
    TINY,
    Mlps,
    Pattern,
    default_block,
    make_mlps,
    shape_of,
)
from gpu_timing import Bench, check_close
from race import Row, dtype_name, measured
from torch import Tensor

from fips_ext import nn
from fips_ext.layout import Encoding

DECODE_TOKENS = 64  # up to here launches and bytes decide


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    tokens: int
    rank_share: float = 0.5
    density: float = 0.25
    encoding: Encoding = "block"
    block: tuple[int, int] | None = None
    dtype: torch.dtype = torch.bfloat16
    quick: bool = False

    def keys(self) -> Row:
        return {
            "case": self.model,
            "dtype": dtype_name(self.dtype),
            "T": self.tokens,
            "a": self.rank_share,
            "density": self.density,
            "encoding": self.encoding,
            "default_block": self.block is None,
        }


# Those of the goals first.
CASES = (
    Case("Llama-3-8B", PREFILL_TOKENS, quick=True),
    Case("Llama-3-8B", PREFILL_TOKENS, rank_share=1.0),
    Case("Gemma-2-2B", PREFILL_TOKENS, quick=True),
    *(Case(model, BATCH_TOKENS[model], quick=True) for model in ("DeiT-B", "Swin-L s1", "Swin-L s2")),
    *(Case(model, tokens, quick=True) for model in ("Llama-3-8B", "Gemma-2-2B") for tokens in (1, 8)),
    *(
        Case(model, 1, density=0.5, encoding="bitmap", quick=model == "Llama-3-8B")
        for model in ("Llama-3-8B", "Gemma-2-2B")
    ),
    # The rest of the planner's grid.
    *(Case(model, BATCH_TOKENS[model]) for model in ("Swin-L s3", "Swin-L s4", "DINOv2-S")),
    *(Case("Llama-3-8B", tokens) for tokens in (16, 64, 512)),
    *(Case("DeiT-B", tokens) for tokens in (1, 197, 1576)),
    *(Case("DeiT-B", BATCH_TOKENS["DeiT-B"], density=density) for density in (0.1, 0.5, 0.75)),
    *(Case("Llama-3-8B", PREFILL_TOKENS, density=density) for density in (0.1, 0.5)),
    *(Case("DeiT-B", BATCH_TOKENS["DeiT-B"], block=block) for block in ((16, 16), (32, 32))),
    *(
        Case(model, tokens, density=0.5, encoding="bitmap")
        for model, tokens in (("DeiT-B", 12608), ("Llama-3-8B", PREFILL_TOKENS), ("Llama-3-8B", 64))
    ),
    Case("SmolLM2-135M", 1),
    Case("SmolLM2-135M", PREFILL_TOKENS),
    Case("Llama-3-70B", PREFILL_TOKENS),
    Case("DeiT-B", 1576, dtype=torch.float16),
    Case("DeiT-B", 1576, dtype=torch.float32),
)


def pattern_of(case: Case, rank: int) -> Pattern:
    return Pattern(case.density, case.block or default_block(rank), case.encoding)


def through(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> list[Tensor]:
    return [layer(x) for layer in layers]


def measure(bench: Bench, case: Case) -> Iterator[Row]:
    shape = shape_of(case.model, bench.dry_run)
    rank = int(shape.d * case.rank_share)
    pattern = pattern_of(case, rank)
    tokens = min(case.tokens, TINY["tokens"]) if bench.dry_run else case.tokens
    make = functools.partial(make_mlps, shape, rank, pattern, case.dtype, bench.device)
    mlps = make()
    x = bench.randn(tokens, shape.d, dtype=case.dtype)
    with torch.no_grad():
        found = check_close(mlps.ours(x), mlps.filled(x))
    shared = {"d": shape.d, "n": shape.n, "r": rank, **pattern.keys(), "difference": found}
    if case.tokens <= DECODE_TOKENS:
        yield shared | decode(bench, mlps, make, x) | {"cached": False, "may_cache": True}
        return
    runs = {name: functools.partial(mlp, x) for name, mlp in mlps.forms().items()}
    module = mlps.ours.module()
    keeps_copies = nn.cache_dense(module) > 0
    yield shared | prefill(bench, runs) | {"cached": False, "may_cache": not keeps_copies}
    if keeps_copies:
        row = prefill(bench, runs | {"ours": lambda: module(x)})
        yield shared | row | {"cached": True, "may_cache": True, "case": f"{case.model} cached"}


def prefill(bench: Bench, runs: dict[str, Callable[[], object]]) -> Row:
    race = bench.race(runs)
    return race.row() | measured({"best_ratio": race.ratio(*race.rivals())})


def decode(bench: Bench, mlps: Mlps, make: Callable[[], Mlps], x: Tensor) -> Row:
    nbytes, dense_nbytes = mlps.ours.nbytes(), mlps.dense.nbytes()
    layers = bench.layers(nbytes)
    stacks: dict[str, list] = {}
    for mlps_of_layer in (mlps, *(make() for _ in range(layers - 1))):
        for name, mlp in mlps_of_layer.forms().items():
            stacks.setdefault(name, []).append(mlp)
    runs = {name: functools.partial(through, stack, x) for name, stack in stacks.items()}
    race = bench.race(runs, graph=True).per_item(layers)
    eager = bench.race(runs).per_item(layers)
    row = {
        "best_ratio": race.ratio(*race.rivals()),
        "layers": layers,
        "our_bytes": nbytes,
        "dense_bytes": dense_nbytes,
        "copy_share": nbytes / race.seconds() / bench.machine["copy_bytes_per_s"],
        "byte_limit_share": race.ratio("dense") * nbytes / dense_nbytes,
        "eager_seconds": eager.row()["seconds"],
        "eager_ratio": eager.row()["ratio"],
    }
    return race.row() | measured(row)


def main(argv: Sequence[str] | None = None) -> int:
    bench = Bench(__doc__, "shared_mlp", 75.0, argv)
    for case in CASES:
        if case.quick or not bench.quick:
            bench.attempt(case.keys(), functools.partial(measure, bench, case))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
