"""How long one MLP takes, compressed and dense, for few and for many tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from ..nn import SharedMLP
from ..reference import ACTIVATIONS
from .facts import Latency

_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_SECONDS = 0.2  # per point


class _Dense(nn.Module):
    """What ``mlp`` computes, with dense weights and the vendor's products."""

    def __init__(self, mlp: SharedMLP) -> None:
        super().__init__()
        self.weights = {role: weight.contiguous() for role, weight in mlp.dense_weights().items()}
        self.biases = {"up": mlp.up_bias, "gate": mlp.gate_bias, "down": mlp.down_bias}
        self.act = ACTIVATIONS[mlp.activation]

    def forward(self, x: Tensor) -> Tensor:
        def linear(role: str, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weights[role], self.biases[role])

        h = linear("up", x)
        h = self.act(linear("gate", x)) * h if "gate" in self.weights else self.act(h)
        return linear("down", h)


@torch.no_grad()
def measure(mlp: SharedMLP, seed: int = 0) -> list[Latency]:
    """Medians of both forms, measured in turns on the device and in the dtype of ``mlp``."""
    dense = _Dense(mlp)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for tokens in _TOKENS:
        x = torch.randn(tokens, mlp.width, generator=generator).to(mlp.base.weight)
        times = [
            Timer("f(x)", globals={"f": f, "x": x}, num_threads=torch.get_num_threads())
            .blocked_autorange(min_run_time=_SECONDS)
            .median
            for f in (dense, mlp)
        ]
        found.append(Latency(tokens, 1e3 * times[0], 1e3 * times[1]))
    return found
