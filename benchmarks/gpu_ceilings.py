"""What a GPU can do at most, and rivals that no other benchmark here races. Needs torch only.

Copy and L2 bandwidth; cuBLAS at the models' shapes; torch BSR, cuSPARSE BSR, sampled_addmm; eigensolvers.
Random data throughout: zeros run faster than real weights do. A rival that fails is a result, not an error.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from gpu_timing import Bench
from race import Row, Run, dtype_name
from torch import Tensor
from triton_bsr import random_bsr

# name: (width d, hidden n, tokens); None: a language model, at 1, 8 and 4096 tokens
MODELS: dict[str, tuple[int, int, int | None]] = {
    "DeiT-B": (768, 3072, 12608),
    "Llama-3-8B": (4096, 14336, None),
    "Gemma-2-2B": (2304, 9216, None),
    "Swin-L s1": (192, 768, 200704),
    "Swin-L s2": (384, 1536, 50176),
    "Swin-L s3": (768, 3072, 12544),
    "Swin-L s4": (1536, 6144, 3136),
    "SmolLM2-135M": (576, 1536, None),
    "DINOv2-S": (384, 1536, 16448),
    "Llama-3-70B": (8192, 28672, None),
}
QUICK_MODELS = 2

# (tokens, r, n, (block along n, block along r))
SPARSE_CASES = (
    (4096, 2048, 8192, (128, 64)),
    (12608, 768, 3072, (64, 64)),
    (4096, 2048, 8192, (16, 16)),
)


class Ceilings:
    """The measurements; in a dry run every size is cut to a few hundred."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def size(self, full: int) -> int:
        return min(full, 128) if self.bench.dry_run else full

    def measure(
        self,
        case: str,
        shape: Sequence[int],
        make: Callable[..., Run],
        work: Callable[..., float],
        unit: str = "FLOP/s",
        dtype: torch.dtype = torch.bfloat16,
        flush: bool = False,
        **keys: object,
    ) -> None:
        """A row: ``make(*shape)`` makes the runner and ``work(*shape)`` counts what one call of it does."""
        sizes = [self.size(size) for size in shape]
        row: Row = {"case": case, "dtype": dtype_name(dtype), "shape": list(shape), **keys}
        self.bench.measure(row, functools.partial(make, *sizes), work(*sizes), unit, flush)

    # -- bandwidth ----------------------------------------------------------------------------------------

    def l2_reads(self) -> None:
        for mib in (8, 16, 32):
            self.measure("L2 read", (64, mib * 2**19), self.repeated_read, lambda t, n: 2.0 * t * n, "B/s")

    def repeated_read(self, times: int, count: int) -> Run:
        repeated = self.bench.randn(count).expand(times, count)  # the same bytes, read `times` times
        return lambda: repeated.sum(1)

    # -- cuBLAS -------------------------------------------------------------------------------------------

    def vendor_products(self) -> None:
        self.gemm("square", 8192, 8192, 8192)
        for name, (d, n, fixed) in list(MODELS.items())[: QUICK_MODELS if self.bench.quick else None]:
            for tokens in (1, 8, 4096) if fixed is None else (fixed,):
                self.gemm(f"up {name}", tokens, d, n)
                self.gemm(f"down {name}", tokens, n, d)

    def gemm(self, case: str, tokens: int, k: int, n: int) -> None:
        def make(tokens: int, k: int, n: int) -> Run:
            x, w = self.bench.randn(tokens, k), self.bench.randn(n, k)
            return lambda: F.linear(x, w)

        flush = tokens <= 16  # decoding finds its weights in no cache
        self.measure(f"cuBLAS {case}", (tokens, k, n), make, lambda t, k, n: 2.0 * t * k * n, flush=flush)

    # -- sparse rivals ------------------------------------------------------------------------------------

    def sparse_rivals(self) -> None:
        for tokens, r, n, block in SPARSE_CASES[: 1 if self.bench.quick else None]:
            for density in (0.25,) if self.bench.quick else (0.25, 0.1):
                self.bsr_products(tokens, r, n, block, density)
        for density in (0.1, 0.25):
            self.measure(
                "sampled_addmm CSR",
                (4096, 2048, 8192),
                functools.partial(self.sampled, density),
                lambda t, r, n, p=density: 2.0 * t * r * n * p,
                dtype=torch.float32,
                density=density,
            )

    def bsr_products(self, tokens: int, r: int, n: int, block: tuple[int, int], density: float) -> None:
        def matrix(r: int, n: int, dtype: torch.dtype) -> Tensor:
            return random_bsr(n, r, block, density, dtype, self.bench.device)

        def linear(tokens: int, r: int, n: int) -> Run:
            x, w = self.bench.randn(tokens, r), matrix(r, n, torch.bfloat16)
            return lambda: F.linear(x, w)

        def addmm(tokens: int, r: int, n: int, dtype: torch.dtype) -> Run:
            w, x = matrix(r, n, dtype), self.bench.randn(r, tokens, dtype=dtype)
            out = torch.empty(n, tokens, dtype=dtype, device=self.bench.device)
            return lambda: torch.addmm(out, w, x, beta=0, out=out)

        def work(tokens: int, r: int, n: int) -> float:
            return 2.0 * tokens * r * n * density

        shape, keys = (tokens, r, n), {"density": density, "block": "x".join(map(str, block))}
        self.measure("torch BSR linear", shape, linear, work, **keys)
        for dtype in (torch.bfloat16, torch.float32):
            make = functools.partial(addmm, dtype=dtype)
            self.measure("cuSPARSE BSR addmm", shape, make, work, dtype=dtype, **keys)

    def sampled(self, density: float, tokens: int, r: int, n: int) -> Run:
        device = self.bench.device
        pattern = (torch.rand(r, n, device=device) < density).float().to_sparse_csr()
        a, b = (self.bench.randn(*size, dtype=torch.float32) for size in ((r, tokens), (tokens, n)))
        return lambda: torch.sparse.sampled_addmm(pattern, a, b, beta=0.0)

    # -- eigensolvers -------------------------------------------------------------------------------------

    def eigensolvers(self) -> None:
        cases = ((12, 192, torch.float32), (1, 768, torch.float64), (1, 4096, torch.float32))
        for batch, d, dtype in cases[: 1 if self.bench.quick else None]:

            def make(batch: int, d: int, dtype: torch.dtype = dtype) -> Run:
                x = self.bench.randn(batch, d, 2 * d, dtype=dtype)
                gram = x @ x.mT / (2 * d)
                return lambda: torch.linalg.eigh(gram)

            self.measure("eigh", (batch, d), make, lambda batch, d: batch, "matrix/s", dtype)


def main(argv: Sequence[str] | None = None) -> int:
    bench = Bench(__doc__, "ceilings", 60.0, argv)
    ceilings = Ceilings(bench)
    ceilings.l2_reads()
    ceilings.vendor_products()
    ceilings.sparse_rivals()
    ceilings.eigensolvers()
    bench.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
