"""Models without memory: built for their structure, before a checkpoint fills them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def build_empty(construct: Callable[[], nn.Module]) -> nn.Module:
    """What ``construct`` builds, with its parameters on the meta device and its buffers real.

    Buffers outside the ``state_dict`` (rotary frequencies, position indices) come from the constructor alone,
    hence they must not be on the meta device.
    """
    try:
        from accelerate import init_empty_weights
    except ImportError as error:
        raise ImportError(
            "loading a model without its dense weights needs accelerate; pip install accelerate"
        ) from error
    # Some constructors draw random numbers (stochastic depth, mask tokens) that nobody reads here.
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        return construct()
