"""Dense copies of an MLP's factors: memory for speed on many tokens.

A ``bitmap`` slice stores nearly every block, so a product of many tokens with it is a dense one that fills V
up first. Where memory allows, the filled V, or the whole ``W = U V``, is kept instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import BlockSparse
from ..reference import ACTIVATIONS

if TYPE_CHECKING:
    from .mlp import SharedMLP

Form = Literal["sparse", "zero_filled", "dense"]

MIN_TOKENS = 32
"""Fewer tokens are a matter of bytes: there the stored factors win, whatever the density."""

_GEMM_DENSITY = 0.6
"""Share of stored slots from which the vendor's GEMM on zeros beats our kernels; ``csrc/core/planner.h``."""

_IN_PLACE = {
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_tanh": lambda x: torch.ops.aten.gelu_.default(x, approximate="tanh"),
    "silu": torch.ops.aten.silu_.default,
    "relu": torch.ops.aten.relu_.default,
}


def choose_form(width: int, rank: int, hidden: int, matrices: int, identity: bool, density: float) -> Form:
    """The form that is fastest on many tokens: a pure function.

    A chain through zero-filled V multiplies ``2 d r + m n r'`` numbers per token (``r' = r + d`` rows with
    the identity part), the dense weights ``m n d`` (METHOD: FLOPs of a shared MLP of ``m`` matrices).

    Args:
        width, rank, hidden: d, r, n.
        matrices: m, 2 for a plain MLP and 3 for a gated one.
        identity: the bases read ``[U, I]``.
        density: stored slots over all slots of the slices, 1 where every block is stored.
    """
    if density <= _GEMM_DENSITY:
        return "sparse"
    rows = rank + (width if identity else 0)
    return (
        "zero_filled" if 2 * width * rank + matrices * hidden * rows < matrices * hidden * width else "dense"
    )


def stored_share(v: BlockSparse) -> float:
    """Slots in stored blocks over all slots of V."""
    return v.row_idx.numel() * v.block[0] * v.block[1] / max(1, v.rows * v.cols)


class DenseCache:
    """The dense form of one :class:`SharedMLP`, remade when its parameters change.

    It belongs to the running process alone: a copy or a pickle of the module has an empty one, and no
    checkpoint holds it.
    """

    def __init__(self, form: Form) -> None:
        self.form = form
        self._weights: dict[str, Tensor] = {}
        self._made_from: list[tuple] | None = None

    @classmethod
    def plan(cls, mlp: SharedMLP) -> DenseCache:
        """An empty cache of the form that suits ``mlp``."""
        slices = [factor.slice() for factor in mlp.factors().values()]
        density = min(stored_share(v) for v in slices)
        base = mlp.base
        return cls(choose_form(base.width, base.rank, mlp.hidden, len(slices), base.identity, density))

    def nbytes(self, mlp: SharedMLP) -> int:
        """Bytes of the copies."""
        if self.form == "sparse":
            return 0
        zero_filled = self.form == "zero_filled"
        rows = sum(factor.rows if zero_filled else mlp.width for factor in mlp.factors().values())
        return rows * mlp.hidden * mlp.base.weight.element_size()

    def fill(self, mlp: SharedMLP) -> None:
        """Make the copies unless they are those of the present parameters."""
        made_from = [_fingerprint(t) for t in _sources(mlp)]
        if made_from == self._made_from:
            return
        with torch.no_grad():
            if self.form == "dense":
                weights = mlp.dense_weights()
            else:
                dtype = mlp.base.weight.dtype
                dense = {role: factor.to_dense(dtype) for role, factor in mlp.factors().items()}
                weights = {role: v if role == "down" else v.t() for role, v in dense.items()}
            self._weights = {role: w.contiguous() for role, w in weights.items()}
        self._made_from = made_from

    def forward(self, mlp: SharedMLP, x: Tensor) -> Tensor:
        """``mlp(x)`` through the vendor's GEMM, without gradients."""
        self.fill(mlp)
        weights, dense = self._weights, self.form == "dense"
        base, out = mlp.base, mlp.base if mlp.base_out is None else mlp.base_out
        z = x if dense else _project_in(x, base.weight, base.identity)
        h = F.linear(z, weights["up"], mlp.up_bias)
        if "gate" in weights:
            gate = _activate(mlp.activation, F.linear(z, weights["gate"], mlp.gate_bias))
            h = h.mul_(gate)
        else:
            h = _activate(mlp.activation, h)
        if dense:
            return F.linear(h, weights["down"], mlp.down_bias)
        w = F.linear(h, weights["down"])
        if not out.identity:
            return F.linear(w, out.weight, mlp.down_bias)
        y = F.linear(w[..., : out.rank], out.weight, mlp.down_bias)
        return y + w[..., out.rank :]

    def __deepcopy__(self, memo: dict) -> DenseCache:
        return DenseCache(self.form)

    def __reduce__(self) -> tuple:
        return DenseCache, (self.form,)


def _project_in(x: Tensor, base: Tensor, identity: bool) -> Tensor:
    z = x @ base
    return torch.cat([z, x], -1) if identity else z


def _activate(name: str, x: Tensor) -> Tensor:
    """The activation of a tensor that nobody else holds."""
    in_place = _IN_PLACE.get(name)
    return ACTIVATIONS[name](x) if in_place is None else in_place(x)


def _sources(mlp: SharedMLP) -> list[Tensor]:
    bases = [mlp.base.weight] + ([] if mlp.base_out is None else [mlp.base_out.weight])
    factors = mlp.factors().values()
    rounding = [factor.rounding.scales for factor in factors if factor.rounding is not None]
    return bases + [factor.values for factor in factors] + rounding


def _fingerprint(t: Tensor) -> tuple:
    """Changes with every write to ``t`` that autograd could notice, and with its storage, type and device."""
    version = 0 if t.is_inference() else t._version
    return t.data_ptr(), version, t.dtype, t.device
