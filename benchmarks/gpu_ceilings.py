"""What a GPU can do at most, and the rivals of a block-sparse product on it. Needs torch only.

Copy and L2 bandwidth; cuBLAS at the models' shapes, for the dense MLP and for the chain with a zero-filled V;
torch BSR (Triton, tuned), cuSPARSE BSR, sampled_addmm; eigensolver and randomised SVD times. Random data
throughout: zeros run faster than real weights do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_timing import Results, seconds_of
from torch import Tensor

# name: (width d, hidden n, gated)
MODELS = {
    "DeiT-B": (768, 3072, False),
    "Swin-L s1": (192, 768, False),
    "Swin-L s2": (384, 1536, False),
    "Swin-L s3": (768, 3072, False),
    "Swin-L s4": (1536, 6144, False),
    "Gemma-2-2B": (2304, 9216, True),
    "Llama-3-8B": (4096, 14336, True),
    "Llama-3-70B": (8192, 28672, True),
    "SmolLM2-135M": (576, 1536, True),
    "DINOv2-S": (384, 1536, False),
}
QUICK_MODELS = ("DeiT-B", "Llama-3-8B")
VISION_TOKENS = {
    "DeiT-B": 12608,
    "Swin-L s1": 200704,
    "Swin-L s2": 50176,
    "Swin-L s3": 12544,
    "Swin-L s4": 3136,
    "DINOv2-S": 16448,
}


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


def random_bsr(rows: int, cols: int, block: tuple[int, int], density: float, dtype: torch.dtype) -> Tensor:
    """A ``[rows, cols]`` BSR matrix with the same number of stored blocks in every block row."""
    per_row = max(1, round(density * cols / block[1]))
    grid = rows // block[0]
    order = torch.rand(grid, cols // block[1], device="cuda").argsort(1)[:, :per_row].sort(1).values
    crow = torch.arange(grid + 1, device="cuda", dtype=torch.int32) * per_row
    values = randn(grid * per_row, *block, dtype=dtype)
    return torch.sparse_bsr_tensor(crow, order.flatten().int(), values, size=(rows, cols))


# ---- bandwidth ----------------------------------------------------------------------------------


def bandwidth(results: Results) -> None:
    gib = 2**30

    def copy():
        source, target = randn(2 * gib // 2), torch.empty(gib, dtype=torch.bfloat16, device="cuda")
        return lambda: target.copy_(source)

    results.measure("copy", copy, shape=(gib,), work=2 * 2 * gib, unit="B/s")
    for mib in (8, 16, 32):
        count, times = mib * 2**20 // 2, 64

        def l2_read(count=count, times=times):
            repeated = randn(count).expand(times, count)  # the same bytes, read from L2 `times` times
            return lambda: repeated.sum(1)

        work = times * count * 2
        results.measure(f"L2 read {mib} MiB", l2_read, shape=(times, count), work=work, unit="B/s")


# ---- cuBLAS -------------------------------------------------------------------------------------


def gemm(results: Results, case: str, tokens: int, k: int, n: int, flush: bool) -> None:
    def make():
        x, w = randn(tokens, k), randn(n, k)
        return lambda: F.linear(x, w)

    results.measure(case, make, tokens=tokens, shape=(k, n), work=2.0 * tokens * k * n, flush=flush)


def dense_mlp(results: Results, name: str, tokens: int, flush: bool) -> None:
    d, n, gated = MODELS[name]

    def make():
        x, up, gate, down = randn(tokens, d), randn(n, d), randn(n, d), randn(d, n)
        if gated:
            return lambda: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        return lambda: F.linear(F.gelu(F.linear(x, up)), down)

    work = 2.0 * tokens * d * n * (3 if gated else 2)
    results.measure(f"dense MLP {name}", make, tokens=tokens, shape=(d, n), work=work, flush=flush)


def zero_filled_chain(results: Results, name: str, tokens: int, ratio: float, flush: bool) -> None:
    d, n, gated = MODELS[name]
    r = int(d * ratio)

    def sparse(rows: int, cols: int) -> Tensor:
        return randn(rows, cols) * (torch.rand(rows, cols, device="cuda") < 0.25)

    def make():
        x, base = randn(tokens, d), randn(d, r)
        up, gate, down = sparse(n, r), sparse(n, r), sparse(r, n)

        def run():
            z = x @ base
            h = F.linear(z, up)
            h = F.silu(F.linear(z, gate)) * h if gated else F.gelu(h)
            return F.linear(F.linear(h, down), base)

        return run

    work = 2.0 * tokens * (2 * d * r + (3 if gated else 2) * r * n)
    case = f"zero-filled chain {name} a={ratio}"
    results.measure(case, make, tokens=tokens, shape=(d, r, n), work=work, flush=flush)


def vendor_products(results: Results, quick: bool) -> None:
    gemm(results, "cuBLAS square", 8192, 8192, 8192, False)
    for name in QUICK_MODELS if quick else MODELS:
        d, n, _ = MODELS[name]
        decode = () if name in VISION_TOKENS else (1, 8)
        for tokens in (*decode, VISION_TOKENS.get(name, 4096)):
            flush = tokens <= 16
            gemm(results, f"cuBLAS up {name}", tokens, d, n, flush)
            gemm(results, f"cuBLAS down {name}", tokens, n, d, flush)
            dense_mlp(results, name, tokens, flush)
            for ratio in (0.5, 1.0):
                zero_filled_chain(results, name, tokens, ratio, flush)


# ---- sparse rivals ------------------------------------------------------------------------------

# (tokens, r, n, (block along n, block along r)), the shapes of the goals
SPARSE_CASES = (
    (4096, 2048, 8192, (128, 64)),
    (12608, 768, 3072, (64, 64)),
    (4096, 2048, 8192, (32, 32)),
    (4096, 2048, 8192, (16, 16)),
    (16, 2048, 14336, (64, 64)),
)


def tuned_triton(bsr: Tensor, dense: Tensor):
    """The fastest of a small grid of launch parameters of torch's Triton BSR kernel."""
    from torch.sparse._triton_ops import bsr_dense_addmm

    tokens = dense.shape[1]
    best: tuple[float, dict] | None = None
    failure: Exception | None = None
    empty = dense.new_zeros(bsr.shape[0], tokens)
    for width in (64, 128, 256):
        for warps, stages in ((4, 2), (4, 3), (8, 3)):
            if tokens % width and tokens > width:
                continue
            meta = {
                "SPLIT_N": max(1, tokens // width),
                "GROUP_SIZE_ROW": 4,
                "num_warps": warps,
                "num_stages": stages,
            }
            try:
                seconds, _ = seconds_of(lambda m=meta: bsr_dense_addmm(empty, bsr, dense, beta=0, meta=m), 5)
            except Exception as error:  # some launch parameters do not fit some blocks
                failure = error
                continue
            if best is None or seconds < best[0]:
                best = (seconds, meta)
    if best is None:
        raise failure or RuntimeError("no launch parameters fit")
    return lambda: bsr_dense_addmm(empty, bsr, dense, beta=0, meta=best[1])


def sparse_rivals(results: Results, quick: bool) -> None:
    for tokens, r, n, block in SPARSE_CASES[:2] if quick else SPARSE_CASES:
        for density in (0.25,) if quick else (0.5, 0.25, 0.1):
            one_density(results, tokens, r, n, block, density)
    sampled(results, quick)


def one_density(
    results: Results, tokens: int, r: int, n: int, block: tuple[int, int], density: float
) -> None:
    flush = tokens <= 16
    common = {
        "tokens": tokens,
        "shape": (r, n, *block),
        "work": 2.0 * tokens * r * n * density,
        "flush": flush,
        "density": density,
    }

    def linear():
        x, w = randn(tokens, r), random_bsr(n, r, block, density, torch.bfloat16)
        return lambda: F.linear(x, w)

    def triton():
        return tuned_triton(random_bsr(n, r, block, density, torch.bfloat16), randn(tokens, r).t())

    def addmm(dtype: torch.dtype):
        w, x = random_bsr(n, r, block, density, dtype), randn(r, tokens, dtype=dtype)
        out = torch.empty(n, tokens, dtype=dtype, device="cuda")
        return lambda: torch.addmm(out, w, x, beta=0, out=out)

    results.measure("torch BSR linear", linear, **common)
    results.measure("torch BSR Triton tuned", triton, **common)
    results.measure("cuSPARSE BSR addmm", lambda: addmm(torch.bfloat16), **common)
    if density == 0.25:
        results.measure(
            "cuSPARSE BSR addmm", lambda: addmm(torch.float32), dtype="float32", repeats=5, **common
        )


def sampled(results: Results, quick: bool) -> None:
    tokens, r, n = (1024, 512, 2048) if quick else (4096, 2048, 8192)
    for density in (0.1, 0.25):

        def make(density=density):
            pattern = (torch.rand(r, n, device="cuda") < density).float().to_sparse_csr()
            a, b = randn(r, tokens, dtype=torch.float32), randn(tokens, n, dtype=torch.float32)
            return lambda: torch.sparse.sampled_addmm(pattern, a, b, beta=0.0)

        results.measure(
            "sampled_addmm CSR",
            make,
            dtype="float32",
            tokens=tokens,
            shape=(r, n),
            work=2.0 * tokens * r * n * density,
            repeats=5,
            density=density,
        )


# ---- initialisation -----------------------------------------------------------------------------


def decompositions(results: Results, quick: bool) -> None:
    for batch, d, dtype in (
        (12, 192, torch.float32),
        (12, 384, torch.float32),
        (12, 768, torch.float32),
        (1, 768, torch.float64),
        (1, 2304, torch.float32),
        (1, 4096, torch.float32),
    )[: 3 if quick else None]:

        def eigh(batch=batch, d=d, dtype=dtype):
            x = randn(batch, d, 2 * d, dtype=dtype)
            gram = x @ x.mT / (2 * d)
            return lambda: torch.linalg.eigh(gram)

        name, shape = str(dtype).removeprefix("torch."), (batch, d, d)
        results.measure("eigh", eigh, dtype=name, shape=shape, work=batch, unit="matrix/s", repeats=3)
    for d in (768,) if quick else (768, 4096):

        def lowrank(d=d):
            w = randn(d, 4 * d, dtype=torch.float32)
            return lambda: torch.svd_lowrank(w, q=d // 2, niter=2)

        case, shape = "svd_lowrank niter=2", (d, 4 * d, d // 2)
        results.measure(case, lowrank, dtype="float32", shape=shape, work=1, unit="matrix/s", repeats=3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu/ceilings.json"))
    parser.add_argument("--quick", action="store_true", help="two models, two sparse cases")
    parser.add_argument("--budget", type=float, default=220.0, help="seconds; later cases are skipped")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "no CUDA GPU is visible to torch\n")
    torch.manual_seed(0)
    results = Results(args.out, args.budget)
    bandwidth(results)
    vendor_products(results, args.quick)
    decompositions(results, args.quick)
    sparse_rivals(results, args.quick)
    results.save()


if __name__ == "__main__":
    main()
