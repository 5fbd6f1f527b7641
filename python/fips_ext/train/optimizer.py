"""AdamW with a step size relative to the size of each tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from .. import memory

_WARM_UP = 0.05
_BETAS = (0.9, 0.99)
_MOMENTS = ("exp_avg", "exp_avg_sq")


class RmsAdamW:
    """AdamW of some parameters, with a short warm-up, then a cosine to zero.

    Args:
        learning_rate: relative to the RMS of each tensor at the start; a tensor of zeros is not trained.
        steps: in all.

    Attributes:
        parameters: all of them.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float, steps: int) -> None:
        self.parameters = list(parameters)
        groups = []
        for parameter in self.parameters:
            rms = float(parameter.detach().square().mean().sqrt()) if parameter.numel() else 0.0
            if rms > 0:
                groups.append({"params": [parameter], "lr": learning_rate * rms})
            memory.relax()
        self._optimizer = self._schedule = None
        if not groups:
            return
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=_BETAS, fused=True)
        warm_up = max(1, round(_WARM_UP * steps))

        def factor(step: int) -> float:
            if step < warm_up:
                return (step + 1) / warm_up
            return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, factor)
        if memory.is_bounded():
            # What AdamW would make at its first step, but not where it would.
            for parameter in (p for group in groups for p in group["params"]):
                moments = {name: memory.zeros(parameter.shape, parameter.dtype) for name in _MOMENTS}
                self._optimizer.state[parameter] = {"step": torch.zeros(()), **moments}

    def step(self) -> None:
        """Use the gradients, and let go of them."""
        if self._optimizer is not None:
            self._optimizer.step()
            self._schedule.step()
        for parameter in self.parameters:
            parameter.grad = None
