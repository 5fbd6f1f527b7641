"""Initialisation on a GPU: bases of rank d / 2 against torch.svd_lowrank(niter=2), eigenvectors against eigh.

``rsvd``: ``W [batch, d, n]`` to orthonormal ``U [batch, d, r]`` and coefficients ``[batch, r, n]``.
``excess_residual`` is ``‖W − U Uᵀ W‖_F`` over that of the best U of this rank, minus one, the largest of the
batch; factors whose product leaves far more are an error, not a time. ``eigh``: eigenvectors of ``W Wᵀ``,
against torch.linalg.eigh of the batch of products; ``residual`` is ``‖G Q − Q diag(λ)‖_F / ‖G‖_F``.
Singular values fall like those of trained weights, slowly.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence

import torch
from gpu_timing import Bench
from race import Row
from torch import Tensor

from fips_ext import _library

POWER_ITERATIONS = 2
SPECTRUM_DECAY = 0.5  # the i-th singular value is i^-decay
EIGH_BOUND = 1e-3
EXCESS_BOUND = 0.1  # twenty times the goal; a random basis is above 1


@dataclasses.dataclass(frozen=True)
class Case:
    method: str
    batch: int
    d: int
    n: int
    quick: bool = False

    def keys(self) -> Row:
        return {
            "case": f"{self.method} {self.batch}x{self.d}x{self.n}",
            "dtype": "float32",
            "method": self.method,
            "batch": self.batch,
            "d": self.d,
        }


CASES = (
    Case("rsvd", 1, 768, 3072, quick=True),
    Case("rsvd", 4, 768, 3072, quick=True),
    Case("eigh", 12, 192, 768, quick=True),
    Case("eigh", 12, 384, 1536),
    Case("rsvd", 1, 4096, 4096),
    Case("eigh", 12, 768, 3072),
    Case("eigh", 1, 2304, 9216),
)


def matrices(bench: Bench, batch: int, d: int, n: int) -> tuple[Tensor, Tensor]:
    """``W [batch, d, n]`` with random singular vectors, and its singular values ``[min(d, n)]``."""
    rank = min(d, n)
    spectrum = torch.arange(1, rank + 1, dtype=torch.float32, device=bench.device).pow(-SPECTRUM_DECAY)

    def orthonormal(size: int) -> Tensor:
        return torch.linalg.qr(bench.randn(batch, size, rank, dtype=torch.float32)).Q

    return (orthonormal(d) * spectrum) @ orthonormal(n).mT, spectrum


def measure(bench: Bench, case: Case) -> Iterator[Row]:
    batch, d, n = (2, 48, 96) if bench.dry_run else (case.batch, case.d, case.n)
    w, spectrum = matrices(bench, batch, d, n)
    yield rsvd(bench, w, spectrum, d // 2) if case.method == "rsvd" else eigh(bench, w)


def rsvd(bench: Bench, w: Tensor, spectrum: Tensor, rank: int) -> Row:
    factors: dict[str, tuple[Tensor, Tensor]] = {}  # of the latest calls: a rival may take seconds

    def ours() -> None:
        u, s, vh = torch.ops.fips.batched_rsvd(w, rank, power_iters=POWER_ITERATIONS)
        factors["ours"] = u, s.unsqueeze(-1) * vh

    def lowrank() -> None:
        u, s, v = torch.svd_lowrank(w, rank, niter=POWER_ITERATIONS)
        factors["svd_lowrank"] = u, s.unsqueeze(-1) * v.mT

    race = bench.race({"ours": ours, "svd_lowrank": lowrank})
    left = excess_residual(w, *factors["ours"], spectrum)
    if not left <= EXCESS_BOUND:
        raise ValueError(f"wrong result: excess residual {left:.2g}, at most {EXCESS_BOUND} is approximation")
    row = race.row() | {"r": rank}
    for name, key in (("ours", "excess_residual"), ("svd_lowrank", "rival_excess_residual")):
        if name in factors:
            base = factors[name][0].double()
            row[key] = excess_residual(w, base, base.mT @ w.double(), spectrum)
    return row


def excess_residual(w: Tensor, base: Tensor, coefficients: Tensor, spectrum: Tensor) -> float:
    residual = torch.linalg.matrix_norm(w.double() - base.double() @ coefficients.double())
    best = spectrum[base.shape[-1] :].double().norm()
    return float((residual / best - 1).max())


def eigh(bench: Bench, w: Tensor) -> Row:
    def ours() -> tuple[Tensor, Tensor]:
        return torch.ops.fips.batched_gram_eigh(w)

    values, vectors = (t.double() for t in ours())
    gram = w.double() @ w.double().mT
    wrong = torch.linalg.matrix_norm(gram @ vectors - vectors * values.unsqueeze(-2))
    residual = float((wrong / torch.linalg.matrix_norm(gram)).max())
    if not residual <= EIGH_BOUND:
        raise ValueError(f"wrong result: residual {residual:.2g}, at most {EIGH_BOUND} is rounding")
    race = bench.race({"ours": ours, "eigh": lambda: torch.linalg.eigh(w @ w.mT)})
    return race.row() | {"residual": residual}


def main(argv: Sequence[str] | None = None) -> int:
    _library.require()
    bench = Bench(__doc__, "init", 45.0, argv)
    for case in CASES:
        if case.quick or not bench.quick:
            bench.attempt(case.keys(), functools.partial(measure, bench, case))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
