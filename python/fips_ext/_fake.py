"""Fake (meta) kernels: shapes and dtypes of every op, for torch.compile and torch.export."""

from __future__ import annotations

import torch
from torch import Tensor


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _block_sparse_mm(x, v, rows, cols, transpose, bias):
    return x.new_empty(*x.shape[:-1], rows if transpose else cols)


def _block_sparse_sddmm(a, b, v, rows, cols):
    return a.new_empty(v[0].shape)


def _contiguous_like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return t.new_empty(t.shape, dtype=dtype)


def _shared_mlp(x, *_args):
    return _contiguous_like(x)


def _gradients(like, dtype, base, base_out, up, gate, down, up_bias, gate_bias, down_bias):
    sources = (
        base,
        base_out,
        up[0],
        None if gate is None else gate[0],
        down[0],
        up_bias,
        gate_bias,
        down_bias,
    )
    return tuple(like.new_empty(0, dtype=dtype) if t is None else _contiguous_like(t, dtype) for t in sources)


def _shared_mlp_backward(grad_y, x, *args):
    return (_contiguous_like(x), *_gradients(x, x.dtype, *args[:8]))


def _reconstruction_loss(x, target, token_weight, scale, *args):
    dtype = _accumulator(x.dtype)
    return (x.new_empty((), dtype=dtype), *_gradients(x, dtype, *args[:8]))


def _batched_rsvd(w, rank, oversample=8, power_iters=2, seed=0):
    batch, m, n = w.shape
    dtype = _accumulator(w.dtype)
    return (
        w.new_empty(batch, m, rank, dtype=dtype),
        w.new_empty(batch, rank, dtype=dtype),
        w.new_empty(batch, rank, n, dtype=dtype),
    )


def _batched_gram_eigh(w, damping=0.0):
    batch, m, _ = w.shape
    dtype = _accumulator(w.dtype)
    return w.new_empty(batch, m, dtype=dtype), w.new_empty(batch, m, m, dtype=dtype)


def _gram_update(gram, x):
    return None


def register() -> None:
    """Register the fake kernels on ``torch.ops.fips``."""
    for name, fake in (
        ("block_sparse_mm", _block_sparse_mm),
        ("block_sparse_sddmm", _block_sparse_sddmm),
        ("shared_mlp", _shared_mlp),
        ("shared_mlp_backward", _shared_mlp_backward),
        ("reconstruction_loss", _reconstruction_loss),
        ("batched_rsvd", _batched_rsvd),
        ("batched_gram_eigh", _batched_gram_eigh),
        ("gram_update", _gram_update),
    ):
        torch.library.register_fake(f"fips::{name}", fake)
