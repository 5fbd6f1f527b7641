"""Errors of the ops on a GPU against float64, beside those of the same computation through the vendor's GEMM.

Every row has ``relative_error``, ``vendor_error`` and ``error_over_bound``: at most 1 is within the goal. The
bound is 2e-6 in float32, 5e-4 where torch may use TF32, and 1.1 times the vendor's error in bfloat16 and
float16. References start from the same rounded inputs. ``repeats`` rows count results that differ from the
first one, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from cpu_shapes import Shape, SharedMlp
from gpu_shapes import TINY, Pattern, make_mlps, make_slice
from gpu_timing import Bench, difference
from race import Row, dtype_name
from torch import Tensor

from fips_ext import BlockSparse, functional, reference
from fips_ext.layout import Encoding

FLOAT32_BOUND, TF32_BOUND, VENDOR_FACTOR = 2e-6, 5e-4, 1.1
REPEATS = 5
NARROW, WIDE = Shape("narrow", 192, 768), Shape("wide", 1024, 3072, "silu", gated=True)
TOKENS = 1000


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    dtype: torch.dtype
    shape: Shape
    tokens: int = TOKENS
    encoding: Encoding = "block"
    tf32: bool = False

    def keys(self) -> Row:
        precision = "tf32" if self.tf32 else dtype_name(self.dtype)
        return {
            "case": f"{self.op} {self.shape.name} {precision}",
            "dtype": dtype_name(self.dtype),
            "T": self.tokens,
            "encoding": self.encoding,
            "precision": precision,
            "op": self.op,
        }


def cases() -> Iterator[Case]:
    halves = (torch.bfloat16, torch.float16)
    for dtype in (torch.float32, *halves):
        for op, tokens in itertools.product(("product", "transposed", "mlp"), (1, 8, TOKENS)):
            yield Case(op, dtype, WIDE, tokens)
        yield Case("sddmm", dtype, WIDE)
        yield Case("mlp", dtype, NARROW)
        yield Case("gradients", dtype, WIDE)
        yield Case("product", dtype, WIDE, 8, "bitmap")
        yield Case("mlp", dtype, WIDE, 1, "bitmap")
    for op in ("product", "mlp", "gradients"):
        yield Case(op, torch.float32, WIDE, tf32=True)
    for op in ("sddmm", "gradients", "mlp"):
        yield Case(f"repeats {op}", torch.bfloat16, WIDE)


def measure(bench: Bench, named: Case) -> Iterator[Row]:
    case = named
    if bench.dry_run:
        shape = dataclasses.replace(named.shape, d=TINY["d"], n=TINY["n"])
        case = dataclasses.replace(named, shape=shape, tokens=min(named.tokens, TINY["tokens"]))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = case.tf32
    try:
        problem = PROBLEMS[case.op.removeprefix("repeats ")](bench, case)
        yield repeats(problem) if case.op.startswith("repeats") else errors(problem, case)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# -- problems: our result, the vendor's, and the exact one; lists where there are several --------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    ours: Callable[[], Sequence[Tensor]]
    vendors: Callable[[], Sequence[Tensor]]
    exact: Callable[[], Sequence[Tensor]]


def product(bench: Bench, case: Case, transpose: bool) -> Problem:
    rank = case.shape.d // 2
    v = new_slice(bench, rank, case)
    x = bench.randn(case.tokens, v.cols if transpose else v.rows, dtype=case.dtype)

    def dense(v: BlockSparse) -> Tensor:
        return v.to_dense().t() if transpose else v.to_dense()

    return Problem(
        lambda: [functional.block_sparse_mm(x, v, transpose)],
        lambda: [x @ dense(v)],
        lambda: [x.double() @ dense(in_double(v))],
    )


def sddmm(bench: Bench, case: Case) -> Problem:
    v = new_slice(bench, case.shape.d // 2, case)
    a, b = (bench.randn(case.tokens, width, dtype=case.dtype) for width in (v.rows, v.cols))
    return Problem(
        lambda: [functional.block_sparse_sddmm(a, b, v)],
        lambda: [reference.block_sparse_sddmm(a, b, v)],
        lambda: [reference.block_sparse_sddmm(a.double(), b.double(), in_double(v))],
    )


def mlp(bench: Bench, case: Case) -> Problem:
    ours = new_mlp(bench, case)
    x = bench.randn(case.tokens, case.shape.d, dtype=case.dtype)
    exact = exact_arguments(ours)
    return Problem(
        lambda: [ours(x)],
        lambda: [reference.shared_mlp(x, **ours.arguments())],
        lambda: [reference.shared_mlp(x.double(), **exact)],
    )


def gradients(bench: Bench, case: Case) -> Problem:
    """Of x and every parameter."""
    ours = new_mlp(bench, case)
    x, grad_y = (bench.randn(case.tokens, case.shape.d, dtype=case.dtype) for _ in range(2))
    exact = SharedMlp(**exact_arguments(ours))

    def through(
        forward: Callable[..., Tensor], mlp: SharedMlp, x: Tensor, grad_y: Tensor
    ) -> Sequence[Tensor]:
        inputs = [t.requires_grad_() for t in (x, *mlp.parameters())]
        with torch.enable_grad():
            return torch.autograd.grad(forward(x, **mlp.arguments()), inputs, grad_y)

    return Problem(
        lambda: through(functional.shared_mlp, ours, x, grad_y),
        lambda: through(reference.shared_mlp, ours, x, grad_y),
        lambda: through(reference.shared_mlp, exact, x.detach().double(), grad_y.double()),
    )


PROBLEMS: dict[str, Callable[[Bench, Case], Problem]] = {
    "product": functools.partial(product, transpose=False),
    "transposed": functools.partial(product, transpose=True),
    "sddmm": sddmm,
    "mlp": mlp,
    "gradients": gradients,
}


def pattern_of(case: Case) -> Pattern:
    return Pattern(0.25 if case.encoding == "block" else 0.5, (64, 64), case.encoding)


def new_slice(bench: Bench, rank: int, case: Case) -> BlockSparse:
    return make_slice(rank, case.shape.n, pattern_of(case), case.dtype, bench.device)


def new_mlp(bench: Bench, case: Case) -> SharedMlp:
    return make_mlps(case.shape, case.shape.d // 2, pattern_of(case), case.dtype, bench.device).ours


def in_double(v: BlockSparse) -> BlockSparse:
    return v.with_values(v.values.double())


def exact_arguments(mlp: SharedMlp) -> dict[str, object]:
    def double(value: object) -> object:
        if isinstance(value, Tensor):
            return value.double()
        return in_double(value) if isinstance(value, BlockSparse) else value

    return {name: double(value) for name, value in mlp.arguments().items()}


# -- judgements ----------------------------------------------------------------------------------------------


def errors(problem: Problem, case: Case) -> Row:
    """The result farthest from its bound."""
    results = zip(problem.ours(), problem.vendors(), problem.exact(), strict=True)
    rows = []
    for ours, vendors, exact in results:
        error, vendor_error = difference(ours, exact), difference(vendors, exact)
        bound = bound_of(case, vendor_error)
        rows.append(
            {"relative_error": error, "vendor_error": vendor_error, "error_over_bound": error / bound}
        )
    if not all(row["relative_error"] <= 1 for row in rows):
        raise ValueError("wrong result: the error is as large as the result")
    return max(rows, key=lambda row: row["error_over_bound"])


def bound_of(case: Case, vendor_error: float) -> float:
    if case.dtype == torch.float32:
        return TF32_BOUND if case.tf32 else FLOAT32_BOUND
    return VENDOR_FACTOR * vendor_error


def repeats(problem: Problem) -> Row:
    first = [t.clone() for t in problem.ours()]
    different = sum(
        not all(torch.equal(a, b) for a, b in zip(first, problem.ours(), strict=True)) for _ in range(REPEATS)
    )
    return {"different": different, "of": REPEATS}


def main(argv: Sequence[str] | None = None) -> int:
    bench = Bench(__doc__, "accuracy", 25.0, argv)
    for case in cases():
        bench.attempt(case.keys(), functools.partial(measure, bench, case))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
