"""One linear map of an MLP, whichever way its module holds it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LinearMap:
    """A map ``[out, in]`` inside a module that is no plain ``nn.Linear`` of its own.

    Reads like an ``nn.Linear``; weight and bias are views of the module's parameters.

    Args:
        module: an ``nn.Linear``, or transformers' ``Conv1D``, whose weight is ``[in, out]``.
        outputs: the part of its outputs that this map is; gate and up of a fused projection are a half each.
    """

    def __init__(self, module: nn.Module, outputs: slice = slice(None)) -> None:
        self.module, self.outputs = module, outputs

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight.t() if is_conv1d(self.module) else self.module.weight
        return weight[self.outputs]

    @property
    def bias(self) -> Tensor | None:
        return None if self.module.bias is None else self.module.bias[self.outputs]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield "weight", self.weight
        if self.bias is not None:
            yield "bias", self.bias

    def parameters(self) -> Iterator[Tensor]:
        return (parameter for _, parameter in self.named_parameters())


Linear = nn.Linear | LinearMap


def module_of(linear: Linear) -> nn.Module:
    """The module whose output is, or holds, that of ``linear``."""
    return linear.module if isinstance(linear, LinearMap) else linear


def outputs_of(linear: Linear) -> slice:
    """Where in the last dimension of that module's output it is."""
    return linear.outputs if isinstance(linear, LinearMap) else slice(None)


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' transposed linear map (GPT-2)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and module.weight.dim() == 2


def is_plain(module: nn.Module) -> bool:
    """Whether ``module`` is a linear map with floating weights and nothing added to it."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return (
        (plain or is_conv1d(module))
        and set(dict(module.named_parameters())) <= {"weight", "bias"}
        and module.weight.dim() == 2
        and module.weight.dtype in _FLOATING
    )


def shape_of(module: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of a linear module."""
    shape = tuple(module.weight.shape)
    return shape[::-1] if is_conv1d(module) else shape
