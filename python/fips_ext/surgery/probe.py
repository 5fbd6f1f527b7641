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
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..reference import ACTIVATIONS
from .linear_map import Linear, LinearMap, is_conv1d, shape_of

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
    up: Linear
    gate: Linear | None
    down: Linear


def match_mlp(module: nn.Module, linears: list[nn.Module]) -> list[Formula]:
    """Every formula that ``module`` computes with its two or three ``linears``; one if it is an MLP.

    Of two, the first may be gate and up in one, either half first.
    """
    found = [formula for roles in _roles(linears) for formula in _match_roles(module, *roles)]
    return found or _match_fused(module, linears)


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


def match_activation(module: nn.Module) -> list[str]:
    """Activations that ``module``, without parameters, computes."""
    x = _input(torch.Generator().manual_seed(0), _WIDTH)
    y = _run(_copy_with(module, {}), x)
    return [name for name, act in _nonlinear() if _equal(y, act(x))]


def runs_in_line(parent: nn.Module, up: str, act: str, down: str) -> bool:
    """Whether the forward code of ``parent`` uses three of its children only as ``down(act(up(x)))``.

    It runs with stand-ins of all children: those three notice what they are given, all others let their first
    argument pass, alone or as the first of a tuple, which is how attention answers.
    """
    names = (up, act, down)
    for extra in range(3):
        # The same noise of down, other noise before it: what comes out must not depend on what is in between.
        outputs = [_in_line(parent, names, extra, seed) for seed in (0, 1)]
        if all(output is not None for output in outputs):
            return torch.equal(*outputs)
    return False


def _in_line(parent: nn.Module, names: tuple[str, str, str], extra: int, seed: int) -> Tensor | None:
    """The output of ``parent`` on stand-ins; None unless it calls ``names`` in order, each on the last."""
    calls: list[tuple[str, Tensor, Tensor]] = []
    noise = dict(zip(names, (2 * seed + 1, 2 * seed + 2, 0), strict=True))

    def noticing(name: str) -> nn.Module:
        def forward(x: Tensor) -> Tensor:
            random = torch.Generator().manual_seed(noise[name])
            y = torch.randn(x.shape, generator=random, dtype=x.dtype)
            calls.append((name, x, y))
            return y

        stand_in = nn.Module()
        stand_in.forward = forward
        return stand_in

    shallow = copy.copy(parent)
    shallow._modules = {
        name: noticing(name)
        if name in names
        else _Passing(extra if any(isinstance(m, nn.Linear) for m in child.modules()) else 0)
        for name, child in parent._modules.items()
    }
    for attribute in _HOOKS:
        setattr(shallow, attribute, type(getattr(parent, attribute))())
    shallow.training = False
    x = _input(torch.Generator().manual_seed(0), _WIDTH)
    try:
        with torch.no_grad():
            y = shallow(x, *[None] * (_required_arguments(parent) - 1))
    except Exception:  # see _copy_with
        return None
    in_order = tuple(name for name, _, _ in calls) == names
    if not in_order or not all(torch.equal(y, x) for (_, _, y), (_, x, _) in itertools.pairwise(calls)):
        return None
    return y[0] if isinstance(y, tuple) else y


class _Passing(nn.Module):
    """Returns its first argument, followed by as many ``None`` as asked for."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        return (first, *[None] * self.extra) if self.extra else first


def _roles(linears: list[nn.Module]) -> Iterator[tuple[list[nn.Module], nn.Module]]:
    """Ways of calling one map ``down [d, n]`` and the others ``[n, d]``, with ``n ≥ d``.

    A map through a bottleneck (``n < d``) is an adapter or a squeeze, not a transformer MLP.
    """
    for down in linears:
        others = [linear for linear in linears if linear is not down]
        d, n = shape_of(down)
        if n >= d and all(shape_of(other) == (n, d) for other in others):
            yield others, down


def _match_roles(module: nn.Module, others: list[nn.Module], down: nn.Module) -> list[Formula]:
    random = torch.Generator().manual_seed(0)
    # Equal sizes where the model's are equal: every assignment of roles has to run.
    hidden = _WIDTH if len(set(shape_of(down))) == 1 else _HIDDEN
    others_ = [_stand_in(random, _WIDTH, hidden, o.bias is not None) for o in others]
    down_ = _stand_in(random, hidden, _WIDTH, down.bias is not None)
    x = _input(random, _WIDTH)
    stand_ins = {down: down_, **dict(zip(others, others_, strict=True))}
    y = _run(_copy_with(module, stand_ins), x)
    if y is None:
        return []
    maps = [linear(x) for linear in others_]
    if len(others) == 1:
        up = _whole(others[0])
        fits = [name for name, act in _nonlinear() if _equal(y, down_(act(maps[0])))]
        return [Formula(name, up, None, _whole(down)) for name in fits]
    found = []
    for name, act in ACTIVATIONS.items():
        # Without an activation gate and up are interchangeable: one order stands for both.
        for gate, up in ((0, 1),) if name == "identity" else ((0, 1), (1, 0)):
            if _equal(y, down_(act(maps[gate]) * maps[up])):
                found.append(Formula(name, _whole(others[up]), _whole(others[gate]), _whole(down)))
    return found


def _match_fused(module: nn.Module, linears: list[nn.Module]) -> list[Formula]:
    if len(linears) != 2:
        return []
    fused, down = sorted(linears, key=shape_of, reverse=True)
    d, n = shape_of(down)
    if n < d or shape_of(fused) != (2 * n, d):
        return []
    random = torch.Generator().manual_seed(0)
    fused_ = _stand_in(random, _WIDTH, 2 * _HIDDEN, fused.bias is not None)
    down_ = _stand_in(random, _HIDDEN, _WIDTH, down.bias is not None)
    x = _input(random, _WIDTH)
    y = _run(_copy_with(module, {fused: fused_, down: down_}), x)
    halves, maps = (slice(0, n), slice(n, 2 * n)), fused_(x).chunk(2, -1)
    return [
        Formula(name, LinearMap(fused, halves[up]), LinearMap(fused, halves[gate]), _whole(down))
        for name, act in ACTIVATIONS.items()
        for gate, up in (((0, 1),) if name == "identity" else ((0, 1), (1, 0)))
        if _equal(y, down_(act(maps[gate]) * maps[up]))
    ]


def _whole(module: nn.Module) -> Linear:
    return LinearMap(module) if is_conv1d(module) else module


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


def _copy_with(module: nn.Module, stand_ins: dict[nn.Module, nn.Module]) -> nn.Module | None:
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
