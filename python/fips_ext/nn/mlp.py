"""The MLP whose weights are a shared base times sparse slices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _library
from ..errors import InvalidArgument
from ..reference import check_activation
from .base import SharedBase
from .dense_cache import MIN_TOKENS, DenseCache
from .factor import SparseFactor


class SharedMLP(nn.Module):
    """A drop-in for a transformer MLP, ``[..., d] → [..., d]``.

    The bases belong to one layer of the group (``owns_base``): there they are registered, so that
    ``state_dict``, ``parameters`` and a checkpoint hold them once. Every other layer keeps an unregistered
    reference, which ``copy.deepcopy`` and ``pickle`` of the whole model preserve.

    Args:
        base: base of the input side (fc1 / gate / up).
        base_out: base of the output side (fc2 / down); None means ``base``.
        up, gate, down: the slices; ``gate`` is None for a plain MLP.
        up_bias, gate_bias, down_bias: dense biases ``[n]``, ``[n]``, ``[d]`` or None.
        activation: a key of ``fips_ext.reference.ACTIVATIONS``.
        owns_base: register the bases as submodules of this layer.
    """

    def __init__(
        self,
        base: SharedBase,
        up: SparseFactor,
        down: SparseFactor,
        gate: SparseFactor | None = None,
        base_out: SharedBase | None = None,
        up_bias: Tensor | None = None,
        gate_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        activation: str = "gelu",
        owns_base: bool = True,
    ) -> None:
        super().__init__()
        out = base if base_out is None else base_out
        for name, factor, source in (("up", up, base), ("gate", gate, base), ("down", down, out)):
            if factor is not None and factor.rows != source.rows:
                raise InvalidArgument(
                    f"{name}: has {factor.rows} rows, but its base has {source.rows} vectors"
                )
        if base.identity != out.identity:
            raise InvalidArgument("base_out: must have the same identity flag as base")
        self.activation = check_activation(activation)
        self.dense_cache: DenseCache | None = None  # see cache_dense
        self.owns_base = owns_base
        self.up, self.gate, self.down = up, gate, down
        if owns_base:
            self.base, self.base_out = base, base_out
        else:
            self.tie(base, base_out)
        for name, bias in (
            ("up_bias", up_bias),
            ("gate_bias", gate_bias),
            ("down_bias", down_bias),
        ):
            self.register_parameter(name, None if bias is None else nn.Parameter(bias))

    def tie(self, base: SharedBase, base_out: SharedBase | None) -> None:
        """Refer to bases that another layer owns."""
        # Written past nn.Module.__setattr__: a registered copy would be saved and counted again.
        self.__dict__["base"], self.__dict__["base_out"] = base, base_out

    @property
    def width(self) -> int:
        """Residual width ``d``."""
        return self.base.width

    @property
    def hidden(self) -> int:
        """Hidden width ``n``."""
        return self.up.cols

    def factors(self) -> dict[str, SparseFactor]:
        """The slices by role, in the order up, gate, down."""
        roles = {"up": self.up, "gate": self.gate, "down": self.down}
        return {role: factor for role, factor in roles.items() if factor is not None}

    def forward(self, x: Tensor) -> Tensor:
        _library.require()
        if self.dense_cache is not None and self._may_use_dense(x):
            return self.dense_cache.forward(self, x)
        base, base_out = self.base, self.base_out
        modules, parameters = self._modules, self._parameters  # see SparseFactor.tensors
        up, gate = modules["up"], modules.get("gate")
        return torch.ops.fips.shared_mlp(
            x,
            base.weight,
            None if base_out is None else base_out.weight,
            up.tensors(),
            None if gate is None else gate.tensors(),
            modules["down"].tensors(),
            parameters["up_bias"],
            parameters["gate_bias"],
            parameters["down_bias"],
            up.cols,
            self.activation,
            base.identity,
        )

    def _may_use_dense(self, x: Tensor) -> bool:
        return (
            not torch.is_grad_enabled()
            and x.numel() >= MIN_TOKENS * self.width
            and x.shape[-1] == self.width
            and not torch.compiler.is_compiling()  # the cache looks at versions, which no graph holds
        )

    def op_arguments(self) -> dict:
        """Keyword arguments of ``functional.shared_mlp`` (and ``reference.shared_mlp``) but ``x``."""
        return {
            "base": self.base.weight,
            "base_out": None if self.base_out is None else self.base_out.weight,
            "up": self.up.slice(self.up.rounded_values()),
            "gate": None if self.gate is None else self.gate.slice(self.gate.rounded_values()),
            "down": self.down.slice(self.down.rounded_values()),
            "up_bias": self.up_bias,
            "gate_bias": self.gate_bias,
            "down_bias": self.down_bias,
            "activation": self.activation,
            "identity": self.base.identity,
        }

    def dense_weights(self) -> dict[str, Tensor]:
        """``U · V`` per role in PyTorch's ``[out, in]`` orientation: up, gate ``[n, d]``; down ``[d, n]``."""
        out = self.base if self.base_out is None else self.base_out
        dense = {}
        for role, factor in self.factors().items():
            base = out if role == "down" else self.base
            v = factor.to_dense(base.weight.dtype)
            w = base.weight @ v[: base.rank]
            if base.identity:
                w = w + v[base.rank :]
            dense[role] = w if role == "down" else w.t()
        return dense

    def extra_repr(self) -> str:
        return f"activation={self.activation}, owns_base={self.owns_base}"


def shared_mlps(model: nn.Module) -> dict[str, SharedMLP]:
    """Every :class:`SharedMLP` of ``model`` by its qualified name, in module order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SharedMLP)}


def cache_dense(model: nn.Module, max_bytes: int | None = None) -> int:
    """Spend memory on speed: keep dense copies of factors that are nearly dense as stored.

    That is so for ``bitmap`` slices, whose products with many tokens are dense ones. The copies serve calls
    of at least 32 tokens without gradients (``torch.no_grad``, ``torch.inference_mode``) and outside
    ``torch.compile``; a parameter that changes has its copy remade. They are in no checkpoint, copy or
    pickle.

    Args:
        model: every :class:`SharedMLP` in it is considered, in module order.
        max_bytes: what the copies may take together; None for no limit, 0 to drop them.

    Returns:
        The bytes that the copies take.

    Raises:
        InvalidArgument: ``max_bytes`` is negative, or ``model`` has no :class:`SharedMLP`.
    """
    if max_bytes is not None and max_bytes < 0:
        raise InvalidArgument(f"max_bytes: got {max_bytes}; expected None or at least 0")
    layers = shared_mlps(model)
    if not layers:
        raise InvalidArgument("model: has no SharedMLP; compress it or load a fips_ext checkpoint first")
    used = 0
    for layer in layers.values():
        cache = DenseCache.plan(layer)
        size = cache.nbytes(layer)
        fits = size > 0 and (max_bytes is None or used + size <= max_bytes)
        layer.dense_cache = cache if fits else None
        if fits:
            cache.fill(layer)
            used += size
    return used
