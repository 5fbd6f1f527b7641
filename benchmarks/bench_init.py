"""Initialisation on a CPU: a base of rank d / 2 and its coefficients, against torch.svd_lowrank(niter=2).

    python benchmarks/bench_init.py --quick --json init.json

Every method starts from ``W [batch, d, n]`` and ends with orthonormal ``U [batch, d, r]`` and coefficients
``[batch, r, n]``. ``excess_residual`` is ``‖W − U Uᵀ W‖_F`` over that of the best U of this rank, minus one,
averaged over the batch. On a CPU the bar is to be no slower than torch in any case.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator

import torch
from cpu_timing import Goal, Session
from race import Row
from torch import Tensor

NEVER_SLOWER = Goal("", "ratio", 1.0)
POWER_ITERATIONS = 2
SPECTRUM_DECAY = 0.5  # the i-th singular value is i^-decay: slow, as in trained weights
ONCE_FROM = 4096  # matrices this wide take minutes; one round has to do


@dataclasses.dataclass(frozen=True)
class Case:
    method: str
    batch: int
    d: int
    n: int

    def keys(self) -> Row:
        return {
            "case": f"{self.method} {self.batch}x{self.d}x{self.n}",
            "dtype": "float32",
            "T": None,
            "density": None,
            "block": "",
            "batch": self.batch,
            "d": self.d,
            "n": self.n,
            "r": self.d // 2,
        }


def cases(shapes: str | None, quick: bool) -> Iterator[Case]:
    sizes = [(batch, 768, 3072) for batch in (1, 4)]
    if not quick:
        sizes.append((1, 4096, 4096))
    if shapes is not None:
        pairs = [pair.split(",") for pair in shapes.split(";") if pair.strip()]
        sizes = [(batch, int(d), int(n)) for d, n in pairs for batch in (1, 4)]
    for size in sizes:
        for method in METHODS:
            yield Case(method, *size)


def gram_eigh(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    _, vectors = torch.ops.fips.batched_gram_eigh(w)
    base = vectors[..., :rank]
    return base, base.mT @ w


def rsvd(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.ops.fips.batched_rsvd(w, rank, power_iters=POWER_ITERATIONS)
    return u, s.unsqueeze(-1) * vh


def svd_lowrank(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, v = torch.svd_lowrank(w, rank, niter=POWER_ITERATIONS)
    return u, s.unsqueeze(-1) * v.mT


METHODS: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "batched_gram_eigh": gram_eigh,
    "batched_rsvd": rsvd,
}


@functools.lru_cache(maxsize=1)  # the methods share their matrices
def matrices(batch: int, d: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """``W [batch, d, n]`` with random singular vectors, and its singular values ``[min(d, n)]``."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(d, n)
    spectrum = torch.arange(1, rank + 1, dtype=torch.float32).pow(-SPECTRUM_DECAY)
    left, right = (torch.linalg.qr(torch.randn(batch, size, rank, generator=generator)).Q for size in (d, n))
    return (left * spectrum) @ right.mT, spectrum


def excess_residual(w: Tensor, base: Tensor, spectrum: Tensor) -> float:
    wide, base = w.double(), base.double()
    residual = torch.linalg.matrix_norm(wide - base @ (base.mT @ wide))
    best = spectrum[base.shape[-1] :].double().norm()
    return float((residual / best - 1).mean())


def least_flops(method: str, case: Case) -> float:
    """The matrix products alone; decompositions are not counted."""
    product = 2.0 * case.batch * case.d * case.n
    rank = case.d // 2
    if method == "batched_gram_eigh":
        return product * (case.d / 2 + rank)  # half of a symmetric product, and the coefficients
    return product * rank * (2 + 2 * POWER_ITERATIONS)


def measure(session: Session, case: Case) -> Iterator[Row]:
    w, spectrum = matrices(case.batch, case.d, case.n, session.args.seed)
    rank = case.d // 2
    ours = METHODS[case.method]
    min_rounds = 1 if case.d >= ONCE_FROM else 3
    runs = {"ours": lambda: ours(w, rank), "svd_lowrank": lambda: svd_lowrank(w, rank)}
    race = session.race(runs, min_rounds=min_rounds)
    yield session.row(
        race,
        "svd_lowrank",
        torch.float32,
        flops=least_flops(case.method, case),
        nbytes=math.prod(w.shape) * w.element_size(),
        goal=NEVER_SLOWER,
        excess_residual=excess_residual(w, ours(w, rank)[0], spectrum),
        rival_excess_residual=excess_residual(w, svd_lowrank(w, rank)[0], spectrum),
    )


def main() -> int:
    session = Session(__doc__)
    for case in cases(session.args.shapes, session.quick):
        session.attempt(case.keys(), functools.partial(measure, session, case))
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
