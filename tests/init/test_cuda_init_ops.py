"""The CUDA initialisation ops against float64: emulated anywhere, on a GPU where there is one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ..devices import CudaOps, cuda

__all__ = ["cuda"]

pytestmark = pytest.mark.usefixtures("single_thread")

EPSILON = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@dataclasses.dataclass(frozen=True)
class InitOps:
    """The ops on tensors of the CPU: inputs are put on the device, results brought back."""

    cuda: CudaOps

    def batched_rsvd(self, *arguments, **options) -> tuple[Tensor, ...]:
        return self._back(self.cuda.ops.batched_rsvd(*self.cuda.put(arguments), **options))

    def batched_gram_eigh(self, *arguments) -> tuple[Tensor, ...]:
        return self._back(self.cuda.ops.batched_gram_eigh(*self.cuda.put(arguments)))

    def gram_update(self, gram: Tensor, x: Tensor) -> None:
        """In place where the device is the CPU or ``gram`` is on it already."""
        self.cuda.ops.gram_update(self.cuda.put(gram), self.cuda.put(x))

    def _back(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert all(result.device.type == self.cuda.device for result in results)
        return tuple(result.cpu() for result in results)


@pytest.fixture
def ops(cuda) -> InitOps:
    return InitOps(cuda)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(batch: int, m: int, n: int, rank: int, seed: int = 0) -> Tensor:
    return randn(batch, m, rank, seed=seed) @ randn(batch, rank, n, seed=seed + 1)


def power_law(batch: int, m: int, n: int, exponent: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Matrices of random singular vectors, and their singular values i^-exponent."""
    k = min(m, n)
    u, _ = torch.linalg.qr(randn(batch, m, k, seed=seed))
    v, _ = torch.linalg.qr(randn(batch, n, k, seed=seed + 1))
    spectrum = torch.arange(1, k + 1, dtype=torch.float64) ** -exponent
    return (u * spectrum) @ v.mT, spectrum


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative to the largest entry of each matrix."""
    scale = expected.abs().amax(dim=tuple(range(1, expected.dim())), keepdim=True).clamp(min=1e-300)
    return float(((actual.double() - expected) / scale).abs().max())


def check_orthonormal_columns(q: Tensor) -> None:
    identity = torch.eye(q.shape[-1], dtype=torch.float64).expand(q.shape[0], -1, -1)
    gap = (q.double().mT @ q.double() - identity).abs().max()
    assert float(gap) < 80 * EPSILON[q.dtype]  # 1e-5 in float32


def check_factors(u: Tensor, s: Tensor, vh: Tensor) -> None:
    check_orthonormal_columns(u)
    check_orthonormal_columns(vh.mT)
    assert bool((s.diff(dim=1) <= 0).all())
    assert bool((s >= 0).all())


def rebuilt(u: Tensor, s: Tensor, vh: Tensor) -> Tensor:
    return (u.double() * s.double().unsqueeze(1)) @ vh.double()


@TYPES
@pytest.mark.parametrize("shape", [(1, 12, 20), (2, 20, 12), (2, 7, 7)], ids=str)
def test_rsvd_of_every_shape_at_full_rank(ops, shape, dtype):
    w = randn(*shape).to(dtype)
    u, s, vh = ops.batched_rsvd(w, min(shape[1:]), 10)
    check_factors(u, s, vh)
    assert s.dtype == u.dtype == vh.dtype == dtype
    assert error(s, torch.linalg.svdvals(w.double())) < 20 * EPSILON[dtype]
    assert error(rebuilt(u, s, vh), w.double()) < 40 * EPSILON[dtype]


@TYPES
@pytest.mark.parametrize("rank", [3, 14, 18])
def test_rsvd_of_rank_deficient_matrices(ops, rank, dtype):
    w = low_rank(2, 18, 25, 5).to(dtype)
    u, s, vh = ops.batched_rsvd(w, rank)
    check_factors(u, s, vh)
    assert error(s, torch.linalg.svdvals(w.double())[:, :rank]) < 20 * EPSILON[dtype]
    if rank >= 5:
        assert error(rebuilt(u, s, vh), w.double()) < 40 * EPSILON[dtype]


@TYPES
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_rsvd_of_constant_matrices(ops, value, dtype):
    w = torch.full((2, 16, 11), value, dtype=dtype)
    u, s, vh = ops.batched_rsvd(w, 11)
    check_factors(u, s, vh)
    assert error(rebuilt(u, s, vh), w.double()) < 40 * EPSILON[dtype]


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_rsvd_of_any_scale_and_of_unequal_batches(ops, scale):
    w = randn(3, 14, 17) * scale
    w[1] = 0
    w[2] *= 1e-10
    u, s, vh = ops.batched_rsvd(w.float(), 14)
    check_factors(u, s, vh)
    assert error(rebuilt(u, s, vh), w.float().double()) < 40 * EPSILON[torch.float32]


@pytest.mark.parametrize("shape", [(60, 120), (120, 60)], ids=str)
@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_rsvd_loses_half_a_percent_at_most(ops, shape, exponent):
    w, spectrum = power_law(1, *shape, exponent)
    rank = 30
    u, s, vh = ops.batched_rsvd(w.float(), rank, power_iters=2)
    check_factors(u, s, vh)
    best = float(spectrum[rank:].square().sum().sqrt())
    assert float((w - rebuilt(u, s, vh)).norm()) < 1.005 * best
    assert error(s[:, :5], spectrum[:5].unsqueeze(0)) < 1e-3


def test_rsvd_keeps_small_singular_values(ops):
    w, spectrum = power_law(1, 40, 30, 0.0)
    spectrum = 10.0 ** -torch.linspace(0, 4, 30, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(w, full_matrices=False)
    w = (u * spectrum) @ vh
    _, s, _ = ops.batched_rsvd(w.float(), 12)
    torch.testing.assert_close(s[0].double(), spectrum[:12], rtol=1e-4, atol=1e-6)


def test_rsvd_is_a_function_of_its_seed(ops):
    w = randn(2, 20, 26).float()
    first, again, other = (ops.batched_rsvd(w, 6, seed=seed) for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("power_iters", [0, 1])
def test_rsvd_of_halves_and_without_oversampling(ops, power_iters):
    w = low_rank(1, 20, 30, 4).bfloat16()
    u, s, vh = ops.batched_rsvd(w, 4, oversample=0, power_iters=power_iters)
    check_factors(u, s, vh)
    assert s.dtype == torch.float32
    best = torch.linalg.svdvals(w.double())[:, 4:].norm()
    assert float((w.double() - rebuilt(u, s, vh)).norm()) < 4 * float(best)


def test_rsvd_of_an_empty_batch_and_wrong_arguments(ops):
    u, s, vh = ops.batched_rsvd(torch.zeros(0, 5, 8), 3)
    assert (u.shape, s.shape, vh.shape) == ((0, 5, 3), (0, 3), (0, 3, 8))
    for arguments, message in [
        ((torch.zeros(5, 8), 3), "w: expected"),
        ((torch.zeros(1, 5, 8), 6), "rank: got 6"),
        ((torch.zeros(1, 5, 8), 3, -1), "oversample: got -1"),
        ((torch.zeros(1, 5, 8), 3, 0, -1), "power_iters: got -1"),
    ]:
        with pytest.raises((RuntimeError, ValueError), match=message):
            ops.batched_rsvd(*arguments)


def check_eigen(values: Tensor, vectors: Tensor, gram: Tensor) -> None:
    epsilon = EPSILON[values.dtype]
    check_orthonormal_columns(vectors)
    assert bool((values.diff(dim=1) <= 0).all())
    assert error(values, torch.linalg.eigvalsh(gram).flip(-1)) < 40 * epsilon
    assert error((vectors.double() * values.double().unsqueeze(1)) @ vectors.double().mT, gram) < 60 * epsilon


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_gram_eigh(ops, dtype):
    w = randn(2, 17, 40).to(dtype)
    values, vectors = ops.batched_gram_eigh(w)
    check_eigen(values, vectors, w.double() @ w.double().mT)
    assert values.dtype == vectors.dtype == (dtype if dtype in EPSILON else torch.float32)


@TYPES
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_gram_eigh_of_singular_matrices(ops, damping, dtype):
    w = torch.cat([low_rank(1, 15, 30, 4), torch.zeros(1, 15, 30), torch.ones(1, 15, 30)]).to(dtype)
    values, vectors = ops.batched_gram_eigh(w, damping)
    gram = w.double() @ w.double().mT
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)
    check_eigen(values, vectors, gram + damping * mean[:, None, None] * torch.eye(15, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_gram_eigh_of_any_scale_and_graded_rows(ops, scale):
    w = randn(1, 12, 30) * scale * 10.0 ** -torch.arange(12, dtype=torch.float64)[:, None].div(2)
    check_eigen(*ops.batched_gram_eigh(w.float()), w.float().double() @ w.float().double().mT)


def test_gram_eigh_above_its_own_solver(ops):
    w = randn(1, 520, 530).float()
    values, vectors = ops.batched_gram_eigh(w, 0.1)
    gram = w.double() @ w.double().mT
    gram += 0.1 * gram.diagonal(dim1=1, dim2=2).mean() * torch.eye(520, dtype=torch.float64)
    assert error((vectors * values.unsqueeze(1)) @ vectors.mT, gram) < 1e-4
    assert bool((values.diff(dim=1) <= 0).all())


def test_gram_eigh_of_nothing_and_wrong_arguments(ops):
    values, vectors = ops.batched_gram_eigh(torch.zeros(0, 5, 8))
    assert (values.shape, vectors.shape) == ((0, 5), (0, 5, 5))
    values, vectors = ops.batched_gram_eigh(torch.zeros(2, 3, 0))
    assert torch.equal(values, torch.zeros(2, 3))
    check_orthonormal_columns(vectors)
    with pytest.raises((RuntimeError, ValueError), match="w: expected"):
        ops.batched_gram_eigh(torch.zeros(5, 8))
    with pytest.raises((RuntimeError, ValueError), match="damping: got -1"):
        ops.batched_gram_eigh(torch.zeros(1, 5, 8), -1.0)


@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gram_update_streams(ops, gram_dtype, dtype):
    x = randn(3, 70, 12).to(dtype)
    x, gram = ops.cuda.put((x, torch.zeros(12, 12, dtype=gram_dtype)))
    for part in x:
        ops.gram_update(gram, part)
    ops.gram_update(gram, x[:0])
    ops.gram_update(gram, x[0, 0])
    ops.gram_update(gram, x.transpose(0, 1)[:, :, ::2].repeat_interleave(2, 2))
    flat, again = x.double().reshape(-1, 12), x[..., ::2].double().repeat_interleave(2, 2).reshape(-1, 12)
    want = flat.t() @ flat + again.t() @ again + torch.outer(flat[0], flat[0])
    assert error(gram[None].cpu(), want[None].cpu()) < (1e-12 if gram_dtype == torch.float64 else 2e-6)


def test_gram_update_takes_more_tokens_than_one_chunk(ops):
    x = randn(8200, 5).float()
    gram = ops.cuda.put(torch.zeros(5, 5, dtype=torch.float64))
    ops.gram_update(gram, x)
    assert error(gram[None].cpu(), (x.double().t() @ x.double()).unsqueeze(0)) < 1e-12


def test_gram_update_refuses_wrong_arguments(ops):
    for gram, message in [
        (torch.zeros(4, 4, dtype=torch.bfloat16), "gram: dtype"),
        (torch.zeros(4, 5), "gram: expected shape"),
        (ops.cuda.put(torch.zeros(8, 4))[::2], "gram: must be contiguous"),  # a copy would be
    ]:
        with pytest.raises((RuntimeError, ValueError), match=message):
            ops.gram_update(gram, torch.zeros(3, 4))
