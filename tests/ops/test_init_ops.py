from __future__ import annotations

import json

import pytest
import torch

from fips_ext import __version__

from .cases import relative_error

ops = torch.ops.fips


def low_rank(batch: int, m: int, n: int, rank: int, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(batch, m, rank, generator=generator, dtype=dtype)
    return left @ torch.randn(batch, rank, n, generator=generator, dtype=dtype)


@pytest.mark.parametrize("shape", [(1, 30, 50), (3, 50, 30), (2, 7, 7)])
def test_rsvd_recovers_a_low_rank_matrix(shape):
    w = low_rank(*shape, rank=5)
    u, s, vh = ops.batched_rsvd(w, 5)
    assert relative_error(u * s.unsqueeze(1) @ vh, w) < 1e-10
    identity = torch.eye(5, dtype=w.dtype).expand(shape[0], 5, 5)
    torch.testing.assert_close(u.mT @ u, identity)
    torch.testing.assert_close(vh @ vh.mT, identity)
    assert bool((s.diff(dim=1) <= 0).all())


def test_rsvd_is_nearly_optimal_on_a_decaying_spectrum():
    generator = torch.Generator().manual_seed(0)
    q1, _ = torch.linalg.qr(torch.randn(2, 120, 120, generator=generator, dtype=torch.float64))
    q2, _ = torch.linalg.qr(torch.randn(2, 200, 120, generator=generator, dtype=torch.float64))
    spectrum = torch.arange(1, 121, dtype=torch.float64) ** -0.7
    w = (q1 * spectrum) @ q2.mT
    u, s, vh = ops.batched_rsvd(w, 40, oversample=16, power_iters=2)
    best = spectrum[40:].square().sum().sqrt()
    residual = (w - u * s.unsqueeze(1) @ vh).flatten(1).norm(dim=1)
    assert bool((residual < 1.01 * best).all())


def test_rsvd_is_a_function_of_its_seed():
    w = torch.randn(2, 40, 60)
    threads = torch.get_num_threads()
    first = ops.batched_rsvd(w, 10, seed=7)
    try:
        torch.set_num_threads(1)
        again = ops.batched_rsvd(w, 10, seed=7)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    other = ops.batched_rsvd(w, 10, seed=8)
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_rsvd_of_degenerate_matrices(value):
    w = torch.full((1, 20, 30), value)
    u, s, vh = ops.batched_rsvd(w, 4)
    assert all(bool(torch.isfinite(t).all()) for t in (u, s, vh))
    torch.testing.assert_close(u * s.unsqueeze(1) @ vh, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gram_eigh(dtype):
    w = torch.randn(3, 20, 50).to(dtype)
    values, vectors = ops.batched_gram_eigh(w)
    gram = w.double() @ w.double().mT
    assert bool((values.diff(dim=1) <= 0).all())
    rebuilt = (vectors * values.unsqueeze(1)) @ vectors.mT
    assert relative_error(rebuilt, gram) < (1e-12 if dtype == torch.float64 else 1e-5)


def test_gram_eigh_damping_lifts_a_singular_matrix():
    w = low_rank(1, 16, 40, 3, torch.float32)
    values, _ = ops.batched_gram_eigh(w, 0.01)
    mean = (w @ w.mT).diagonal(dim1=1, dim2=2).mean()
    assert float(values.min()) > 0.009 * float(mean)


@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gram_update_streams(gram_dtype, dtype):
    x = torch.randn(3, 70, 12).to(dtype)
    gram = torch.zeros(12, 12, dtype=gram_dtype)
    for part in x:
        ops.gram_update(gram, part)
    ops.gram_update(gram, x[:0])
    flat = x.double().reshape(-1, 12)
    assert relative_error(gram, flat.t() @ flat) < (1e-12 if gram_dtype == torch.float64 else 1e-6)


def test_gram_update_takes_more_tokens_than_one_chunk():
    x = torch.randn(20000, 8)
    gram = torch.zeros(8, 8, dtype=torch.float64)
    ops.gram_update(gram, x)
    assert relative_error(gram, x.double().t() @ x.double()) < 1e-12


def test_opcheck():
    w = torch.randn(2, 12, 20, dtype=torch.float64)
    # Singular vectors have no unique sign, so the checks that compare two calls see the same seed.
    torch.library.opcheck(ops.batched_rsvd.default, (w, 4))
    torch.library.opcheck(ops.batched_gram_eigh.default, (w, 0.1))
    torch.library.opcheck(ops.gram_update.default, (torch.zeros(20, 20, dtype=torch.float64), w))


def test_decompositions_refuse_to_be_differentiated():
    w = torch.randn(1, 8, 9, requires_grad=True)
    values, _ = ops.batched_gram_eigh(w)
    with pytest.raises(RuntimeError, match=r"no derivative.*torch\.no_grad"):
        values.sum().backward()


def test_autocast_does_not_lower_decompositions():
    w = torch.randn(2, 30, 40)
    outside, gram = ops.batched_gram_eigh(w, 0.1), torch.zeros(40, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ops.batched_gram_eigh(w, 0.1)
        svd = ops.batched_rsvd(w, 5)
        ops.gram_update(gram, w)
    assert torch.equal(inside[0], outside[0])
    assert all(t.dtype == torch.float32 for t in svd)
    flat = w.reshape(-1, 40)
    assert relative_error(gram, flat.t() @ flat) < 1e-6


def test_gram_update_is_seen_by_autograd():
    gram = torch.zeros(4, 4)
    before = gram._version
    ops.gram_update(gram, torch.randn(3, 4))
    assert gram._version > before


def test_build_info():
    info = json.loads(ops.build_info())
    assert info["version"] == __version__
    assert "scalar" in info["cpu_isas"]
    assert info["cpu_isa"] in info["cpu_isas"]


def test_unknown_cpu_capability_is_refused(monkeypatch):
    monkeypatch.setenv("FIPS_CPU_CAPABILITY", "sse9")
    with pytest.raises(
        ValueError, match=r"FIPS_CPU_CAPABILITY.*sse9.*scalar, avx2, avx512, avx512_bf16 and amx"
    ):
        ops.build_info()
