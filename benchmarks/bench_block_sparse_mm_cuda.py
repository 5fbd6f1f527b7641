"""block_sparse_mm on a GPU against cuBLAS on the same dense shape and on a zero-filled V, and torch BSR.

Each row names the goal it answers (G1-G5, G9). ``e`` is FLOP/s on stored blocks over the FLOP/s of cuBLAS on
the same dense shape; ``speedup`` is over cuBLAS, which a zero-filled V runs at, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_ceilings import tuned_triton
from gpu_timing import Results

from fips_ext import BlockSparse, functional

# goal, tokens, r, n, (bk, bn), density, encoding
CASES = (
    ("G1", 4096, 2048, 8192, (64, 128), 0.5, "block"),
    ("G1", 4096, 2048, 8192, (64, 128), 0.25, "block"),
    ("G1", 4096, 2048, 8192, (64, 128), 0.1, "block"),
    ("G2", 12608, 768, 3072, (64, 64), 0.25, "block"),
    ("G3", 4096, 2048, 8192, (32, 32), 0.1, "block"),
    ("G3", 4096, 2048, 8192, (16, 16), 0.1, "block"),
    ("G9", 1, 2048, 14336, (64, 128), 0.5, "block"),
    ("G9", 8, 2048, 14336, (64, 128), 0.5, "block"),
    ("G9", 8, 2048, 14336, (64, 64), 0.5, "block"),
    ("G16", 1, 2048, 14336, (64, 64), 0.5, "bitmap"),
    ("G16", 64, 2048, 14336, (64, 64), 0.5, "bitmap"),
)
QUICK = (1, 3, 5, 7, 9)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def make_slice(r: int, n: int, block: tuple[int, int], density: float, encoding: str, dtype) -> BlockSparse:
    """Equal block counts per block column for ``block``; for ``bitmap`` every block stored, slots random."""
    dense = torch.randn(r, n, device="cuda")
    if encoding == "bitmap":
        keep = torch.rand(r, n, device="cuda") < density
    else:
        order = torch.rand(r // block[0], n // block[1], device="cuda").argsort(0).argsort(0)
        kept = order < max(1, round(density * (r // block[0])))
        keep = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return BlockSparse.from_dense(dense.to(dtype), block, encoding, keep)


def run_case(results: Results, case: tuple, dtype_name: str, transpose: bool) -> None:
    goal, tokens, r, n, block, density, encoding = case
    dtype = DTYPES[dtype_name]
    v = make_slice(r, n, block, density, encoding, dtype)
    x = torch.randn(tokens, n if transpose else r, device="cuda").to(dtype)
    common = {
        "dtype": dtype_name,
        "tokens": tokens,
        "shape": (r, n, *block),
        "flush": tokens <= 64,
        "goal": goal,
        "density": density,
        "encoding": encoding,
        "transpose": transpose,
    }
    dense_work = 2.0 * tokens * r * n
    weight = v.to_dense() if transpose else v.to_dense().t().contiguous()  # [out, in], zeros filled in
    vendor = results.measure(
        "cuBLAS zero-filled", lambda: lambda: F.linear(x, weight), work=dense_work, **common
    )
    full = torch.randn_like(weight)
    results.measure("cuBLAS dense", lambda: lambda: F.linear(x, full), work=dense_work, **common)
    if encoding == "block" and not transpose and dtype_name != "float32":
        bsr = weight.to_sparse_bsr((block[1], block[0]))
        triton_work = dense_work * density
        results.measure(
            "torch BSR Triton tuned", lambda: tuned_triton(bsr, x.t()), work=triton_work, **common
        )
    stored = 2.0 * tokens * (v.num_blocks * block[0] * block[1])
    ours = results.measure(
        "fips", lambda: lambda: functional.block_sparse_mm(x, v, transpose), work=stored, **common
    )
    if ours and vendor:
        row = results.rows[-1]
        row["e"] = (stored / ours) / (dense_work / vendor)
        row["speedup"] = vendor / ours
        row["slice_bytes_per_s"] = v.nbytes() / ours
        rates = (
            f"e={row['e']:.3f} speedup={row['speedup']:.2f} slice={row['slice_bytes_per_s'] / 1e12:.2f} TB/s"
        )
        print(f"    {goal} {encoding} p={density} transpose={transpose}: {rates}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu/block_sparse_mm.json"))
    parser.add_argument("--quick", action="store_true", help="five cases, bfloat16, forward only")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds; later cases are skipped")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "no CUDA GPU is visible to torch\n")
    torch.manual_seed(0)
    results = Results(args.out, args.budget)
    for case in [CASES[i] for i in QUICK] if args.quick else CASES:
        for transpose in (False,) if args.quick else (False, True):
            run_case(results, case, "bfloat16", transpose)
    if not args.quick:
        for dtype in ("float16", "float32"):
            run_case(results, CASES[1], dtype, False)
    results.save()


if __name__ == "__main__":
    main()
