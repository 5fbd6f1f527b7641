"""Functional API: ``torch.ops.fips.*`` on :class:`~fips_ext.layout.BlockSparse` slices.

Same arguments as :mod:`fips_ext.reference`, which is the definition of each op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from .layout import BlockSparse


def block_sparse_mm(x: Tensor, v: BlockSparse, transpose: bool = False, bias: Tensor | None = None) -> Tensor:
    """``x · V`` (``[..., r] → [..., n]``) or ``x · Vᵀ`` (``[..., n] → [..., r]``), plus ``bias``."""
    _library.require()
    return torch.ops.fips.block_sparse_mm(x, v.tensors(), v.rows, v.cols, transpose, bias)


def block_sparse_sddmm(a: Tensor, b: Tensor, v: BlockSparse) -> Tensor:
    """``aᵀ · b`` on the stored slots of ``v``; returns the shape of ``v.values``."""
    _library.require()
    return torch.ops.fips.block_sparse_sddmm(a, b, v.tensors(), v.rows, v.cols)


def shared_mlp(
    x: Tensor,
    base: Tensor,
    base_out: Tensor | None,
    up: BlockSparse,
    gate: BlockSparse | None,
    down: BlockSparse,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "gelu",
    identity: bool = False,
) -> Tensor:
    """The whole MLP on shared factors, ``[..., d] → [..., d]``; see ``reference.shared_mlp``."""
    _library.require()
    return torch.ops.fips.shared_mlp(
        x,
        base,
        base_out,
        up.tensors(),
        None if gate is None else gate.tensors(),
        down.tensors(),
        up_bias,
        gate_bias,
        down_bias,
        up.cols,
        activation,
        identity,
    )


def reconstruction_loss(
    x: Tensor,
    target: Tensor,
    scale: float,
    base: Tensor,
    base_out: Tensor | None,
    up: BlockSparse,
    gate: BlockSparse | None,
    down: BlockSparse,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "gelu",
    identity: bool = False,
    token_weight: Tensor | None = None,
) -> Tensor:
    """``scale · Σ_t w_t ‖shared_mlp(x_t) − target_t‖²`` with every parameter gradient made in the same pass.

    ``token_weight``: float32, one entry per token, default all ones.
    ``x`` and ``target`` are data: no gradient flows to them. The forward pass already holds the gradients, so
    ``backward()`` costs a scaling; nothing of size ``tokens × n`` is kept.
    """
    _library.require()
    return torch.ops.fips.reconstruction_loss(
        x,
        target,
        token_weight,
        scale,
        base,
        base_out,
        up.tensors(),
        None if gate is None else gate.tensors(),
        down.tensors(),
        up_bias,
        gate_bias,
        down_bias,
        up.cols,
        activation,
        identity,
    )[0]
