"""The oracle: every op of ``torch.ops.fips`` in pure PyTorch, differentiable, any dtype and device.

Slow on purpose: a slice is made dense and multiplied. Tests run it in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InvalidArgument
from .layout import BlockSparse

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def check_activation(name: str) -> str:
    """Return ``name`` if it is a known activation, else raise ``InvalidArgument``."""
    if name not in ACTIVATIONS:
        raise InvalidArgument(f"activation: got {name!r}; allowed are {', '.join(ACTIVATIONS)}")
    return name


def block_sparse_mm(x: Tensor, v: BlockSparse, transpose: bool = False, bias: Tensor | None = None) -> Tensor:
    """``x · V`` (``[..., r] → [..., n]``) or, transposed, ``x · Vᵀ`` (``[..., n] → [..., r]``), plus bias."""
    dense = v.to_dense(x.dtype)
    y = x @ (dense.t() if transpose else dense)
    return y if bias is None else y + bias


def block_sparse_sddmm(a: Tensor, b: Tensor, v: BlockSparse) -> Tensor:
    """``aᵀ · b`` on the stored slots of ``v``: ``a [..., r]``, ``b [..., n]`` → the shape of ``v.values``."""
    product = a.reshape(-1, v.rows).t() @ b.reshape(-1, v.cols)
    _, grad = torch.autograd.functional.vjp(
        lambda values: v.with_values(values).to_dense(),
        torch.zeros(v.values.shape, dtype=product.dtype, device=product.device),
        product,
        create_graph=product.requires_grad,
    )
    return grad


def project_in(x: Tensor, base: Tensor, identity: bool) -> Tensor:
    """``z = x · [U, I]`` or ``x · U``: ``[..., d] → [..., r (+ d)]``."""
    z = x @ base
    return torch.cat([z, x], -1) if identity else z


def project_out(w: Tensor, base: Tensor, identity: bool) -> Tensor:
    """``y = w · [U, I]ᵀ`` or ``w · Uᵀ``: ``[..., r (+ d)] → [..., d]``."""
    rank = base.shape[1]
    y = w[..., :rank] @ base.t()
    return y + w[..., rank:] if identity else y


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
    """The whole MLP on shared factors (FiPS, arXiv 2411.09816).

    Plain ``y = act(x U V_up + b_up) V_downᵀ U_outᵀ + b_down``; gated
    ``y = (act(x U V_gate + b_gate) ⊙ (x U V_up + b_up)) V_downᵀ U_outᵀ + b_down``. ``U_out`` is ``base`` when
    ``base_out`` is None; with ``identity`` both bases read ``[U, I]``.
    """
    act = ACTIVATIONS[check_activation(activation)]
    z = project_in(x, base, identity)
    h = block_sparse_mm(z, up, bias=up_bias)
    h = act(h) if gate is None else act(block_sparse_mm(z, gate, bias=gate_bias)) * h
    w = block_sparse_mm(h, down, transpose=True)
    y = project_out(w, base if base_out is None else base_out, identity)
    return y if down_bias is None else y + down_bias


def reconstruction_loss(
    x: Tensor, target: Tensor, scale: float, *, token_weight: Tensor | None = None, **mlp
) -> Tensor:
    """``scale · Σ_t w_t ‖shared_mlp(x_t) − target_t‖²``.

    With ``w = 1`` and ``scale = 1 / Σ target²`` this is the normalised MSE.

    Args:
        token_weight: one entry per token, default all ones.
        mlp: the arguments of :func:`shared_mlp` after x.
    """
    squared = (shared_mlp(x, **mlp) - target).square().sum(-1)
    if token_weight is not None:
        squared = squared * token_weight.view(squared.shape).to(squared.dtype)
    return squared.sum() * scale
