"""Deciding what a module computes by running it.

Names say little: ``fc1``, ``w1``, ``c_fc`` and ``dense`` are all in use, and an activation may be a module, a
function or a line of code. So the forward code of a module runs on *stand-ins* of its linear maps, small ones
with known float64 weights, and its output is compared with every formula that a ``SharedMLP`` can compute.
The stand-ins make the answer independent of the model's weights (zeros included), dtype and device, and cost
next to nothing. The model itself is never run: the probe works on a copy without hooks.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..reference import ACTIVATIONS

# Sizes of the stand-ins: different from each other, so that a swapped map fails, and small.
_WIDTH, _HIDDEN = 12, 20
# Pre-activations reach from far below 1 (where GELU and its tanh form differ most, relatively) to far above
# 10 (where clipped activations bend). The tolerance lets a module round to float32 inside and is two orders
# of magnitude below the difference of the two GELUs.
_TOKENS, _SMALLEST, _LARGEST = 48, 0.1, 30.0
_TOLERANCE = 1e-5
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Formula(NamedTuple):
    """What a probe found: the activation and the role of each linear map."""

    activation: str
    up: nn.Linear
    gate: nn.Linear | None
    down: nn.Linear


def match_mlp(module: nn.Module, linears: list[nn.Linear]) -> list[Formula]:
    """Every formula that ``module`` computes with its two or three ``linears``; one if it is an MLP."""
    return [formula for roles in _roles(linears) for formula in _match_roles(module, *roles)]


def match_intermediate(module: nn.Module, up: nn.Linear) -> list[str]:
    """Activations ``act`` for which ``module(x) = act(up(x))``."""
    random = torch.Generator().manual_seed(0)
    up_ = _stand_in(random, _WIDTH, _HIDDEN, up.bias is not None)
    x = _input(random, _WIDTH)
    y, hidden = _run(_copy_with(module, {up: up_}), x), up_(x)
    return [name for name, act in _nonlinear() if _equal(y, act(hidden))]


def starts_with(module: nn.Module, down: nn.Linear) -> bool:
    """Whether ``module(h, ...)`` uses ``h`` only as ``down(h)``: then ``down`` can move upstream."""
    arguments = _required_arguments(module)
    if arguments not in (1, 2):
        return False
    random = torch.Generator().manual_seed(0)
    # Norms after the map fix its output width, so only its input is narrowed.
    down_ = _stand_in(random, _HIDDEN, down.out_features, down.bias is not None)
    h = _input(random, _HIDDEN)
    residual = [_input(random, down.out_features)] * (arguments - 1)
    y = _run(_copy_with(module, {down: down_}), h, *residual)
    return _equal(y, _run(_copy_with(module, {down: nn.Identity()}), down_(h), *residual))


def is_plain_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear map with floating weights and nothing added to it."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and set(dict(module.named_parameters())) <= {"weight", "bias"}
        and module.weight.dim() == 2
        and module.weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    )


def _roles(linears: list[nn.Linear]) -> Iterator[tuple[list[nn.Linear], nn.Linear]]:
    """Ways of calling one map ``down [d, n]`` and the others ``[n, d]``, with ``n ≥ d``.

    A map through a bottleneck (``n < d``) is an adapter or a squeeze, not a transformer MLP.
    """
    for down in linears:
        others = [linear for linear in linears if linear is not down]
        n, d = down.in_features, down.out_features
        if n >= d and all((o.out_features, o.in_features) == (n, d) for o in others):
            yield others, down


def _match_roles(module: nn.Module, others: list[nn.Linear], down: nn.Linear) -> list[Formula]:
    random = torch.Generator().manual_seed(0)
    # Equal sizes where the model's are equal: every assignment of roles has to run.
    hidden = _WIDTH if down.in_features == down.out_features else _HIDDEN
    others_ = [_stand_in(random, _WIDTH, hidden, o.bias is not None) for o in others]
    down_ = _stand_in(random, hidden, _WIDTH, down.bias is not None)
    x = _input(random, _WIDTH)
    stand_ins = {down: down_, **dict(zip(others, others_, strict=True))}
    y = _run(_copy_with(module, stand_ins), x)
    if y is None:
        return []
    maps = [linear(x) for linear in others_]
    if len(others) == 1:
        up = others[0]
        return [Formula(name, up, None, down) for name, act in _nonlinear() if _equal(y, down_(act(maps[0])))]
    found = []
    for name, act in ACTIVATIONS.items():
        # Without an activation gate and up are interchangeable: one order stands for both.
        for gate, up in ((0, 1),) if name == "identity" else ((0, 1), (1, 0)):
            if _equal(y, down_(act(maps[gate]) * maps[up])):
                found.append(Formula(name, others[up], others[gate], down))
    return found


def _nonlinear() -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """Activations of a plain MLP: two linear maps in a row are a low-rank map, not an MLP."""
    return [(name, act) for name, act in ACTIVATIONS.items() if name != "identity"]


def _stand_in(random: torch.Generator, inputs: int, outputs: int, bias: bool) -> nn.Linear:
    """A linear map with entries that keep the scale of its input."""
    options = {"generator": random, "dtype": torch.float64, "device": "cpu"}
    # On the meta device the module's own initialisation touches no random state.
    linear = nn.Linear(inputs, outputs, bias=bias, device="meta", dtype=torch.float64)
    linear.weight = nn.Parameter(torch.randn(outputs, inputs, **options) / inputs**0.5)
    if bias:
        linear.bias = nn.Parameter(torch.randn(outputs, **options))
    return linear


def _input(random: torch.Generator, width: int) -> Tensor:
    """Tokens ``[1, tokens, width]`` of growing scale."""
    scale = torch.logspace(0, 1, _TOKENS, _LARGEST / _SMALLEST, dtype=torch.float64, device="cpu")
    x = torch.randn(_TOKENS, width, generator=random, dtype=torch.float64, device="cpu")
    return (x * (_SMALLEST * scale)[:, None])[None]


def _copy_with(module: nn.Module, stand_ins: dict[nn.Linear, nn.Module]) -> nn.Module | None:
    """A float64 copy of ``module`` in eval mode, its ``stand_ins`` swapped in; None if it has no copy.

    Parameters other than those of the linear maps (norms) become ones.
    """
    memo: dict[int, object] = {id(linear): small for linear, small in stand_ins.items()}
    for child in module.modules():
        # Hooks are the user's: they must not see the probe, nor be copied with all they hold.
        for attribute in _HOOKS:
            hooks = getattr(child, attribute, None)
            if hooks is not None:
                memo[id(hooks)] = type(hooks)()
        if child not in stand_ins:
            for parameter in child.parameters(recurse=False):
                ones = torch.ones(parameter.shape, dtype=torch.float64, device="cpu")
                memo[id(parameter)] = nn.Parameter(ones)
    try:
        return copy.deepcopy(module, memo).to("cpu", torch.float64).eval()
    except Exception:  # whatever a foreign module raises, it is not a known MLP
        return None


@torch.no_grad()
def _run(module: nn.Module | None, *inputs: Tensor) -> Tensor | None:
    """``module(*inputs)``, or None when that raises or is not one tensor."""
    if module is None:
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            output = module(*inputs)
    except Exception:  # see _copy_with
        return None
    return output if isinstance(output, Tensor) else None


def _equal(y: Tensor | None, expected: Tensor | None) -> bool:
    """Equality per token, relative to the token's norm."""
    if y is None or expected is None or y.shape != expected.shape:
        return False
    error = (y.detach().double() - expected.detach()).norm(dim=-1)
    return bool((error <= _TOLERANCE * expected.detach().norm(dim=-1)).all())


def _required_arguments(module: nn.Module) -> int:
    parameters = inspect.signature(module.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)
