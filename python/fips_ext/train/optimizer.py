"""AdamW with a step size relative to the size of each tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

_WARM_UP = 0.05
_BETAS = (0.9, 0.99)


def rms_adamw(
    modules: Iterable[nn.Module], learning_rate: float, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """An optimiser of all parameters and its schedule: a short warm-up, then a cosine to zero.

    Args:
        learning_rate: relative to the RMS of each tensor at the start; a tensor of zeros is not trained.
        steps: in all.
    """
    groups = []
    for parameter in nn.ModuleList(modules).parameters():
        rms = float(parameter.detach().square().mean().sqrt()) if parameter.numel() else 0.0
        if rms > 0:
            groups.append({"params": [parameter], "lr": learning_rate * rms})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=_BETAS, fused=True)
    warm_up = max(1, round(_WARM_UP * steps))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
