"""Back to a dense model, for whoever wants out."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..errors import InvalidArgument, SurgeryError
from ..nn import SharedMLP
from ..nn.mlp import shared_mlps
from .dense_mlp import AbsorbedLinear, DenseMLP
from .find import find_mlps
from .linear_map import module_of


@torch.no_grad()
def to_dense(model: nn.Module, into: nn.Module | None = None) -> nn.Module:
    """A dense model that computes what a compressed one computes, up to rounding.

    Its weights are products ``U · V`` in the dtype of ``model``; its hidden neurons may be in another order
    than those of the model that was compressed.

    Args:
        model: holds ``SharedMLP`` modules; it is not changed.
        into: a freshly built dense model of the same architecture, which is filled; may be left out for
            models of transformers.

    Returns:
        ``into``, or the new model, with the device and mode of ``model``.

    Raises:
        InvalidArgument: ``model`` is not compressed, or ``into`` is needed.
        SurgeryError: ``into`` is of another architecture.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    shared = shared_mlps(model)
    if not shared:
        raise InvalidArgument(f"model: {type(model).__name__} has no SharedMLP; it is dense already")
    if into is None:
        into = _rebuilt(model)
    into.to(next(iter(shared.values())).base.weight.device)
    mlps = {mlp.name: mlp for mlp in find_mlps(into)}
    if stray := sorted(shared.keys() - mlps.keys()):
        raise SurgeryError(
            f"into: {', '.join(stray[:4])} of model is no MLP in it; build it as model was built"
        )
    done: set[int] = set()
    for name, module in shared.items():
        _fill(mlps[name], module)
        done.update(id(p) for m in mlps[name].linears().values() for p in module_of(m).parameters())
    _copy_rest(model, into, done)
    return into.train(model.training)


def _copy_rest(model: nn.Module, into: nn.Module, done: set[int]) -> None:
    """Every other tensor, in its own dtype; tensors that are one stay one."""
    places = model.named_modules(remove_duplicate=False)
    replaced = tuple(f"{name}." for name, module in places if isinstance(module, SharedMLP | AbsorbedLinear))
    given = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    given = {name: tensor for name, tensor in given.items() if not name.startswith(replaced)}
    wanted = {**dict(into.named_parameters()), **dict(into.named_buffers())}
    missing = sorted(name for name, tensor in wanted.items() if name not in given and id(tensor) not in done)
    stray = sorted(given.keys() - {*wanted, *dict(into.named_parameters(remove_duplicate=False))})
    if missing or stray:
        raise SurgeryError(
            f"into: has {', '.join(missing[:4]) or 'nothing'} that model has not, and lacks "
            f"{', '.join(stray[:4]) or 'nothing'}; build it as model was built"
        )
    for name, tensor in wanted.items():
        if name in given and id(tensor) not in done:
            tensor.data = given[name].detach().clone()


def _rebuilt(model: nn.Module) -> nn.Module:
    """A model of transformers once more, with random weights."""
    config = copy.deepcopy(getattr(model, "config", None))
    if not hasattr(config, "save_pretrained"):
        raise InvalidArgument(
            f"into: {type(model).__name__} is none of transformers; build a dense one and pass it as into="
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        dense = type(model)(config)
    if getattr(model, "generation_config", None) is not None:
        dense.generation_config = copy.deepcopy(model.generation_config)
    return dense


def _fill(dense: DenseMLP, shared: SharedMLP) -> None:
    biases = {"up": shared.up_bias, "gate": shared.gate_bias, "down": shared.down_bias}
    weights = shared.dense_weights()
    linears = dense.linears()
    wanted = {role: (tuple(m.weight.shape), m.bias is not None) for role, m in linears.items()}
    given = {role: (tuple(w.shape), biases[role] is not None) for role, w in weights.items()}
    if given != wanted:
        raise SurgeryError(f"into: {dense.name} has maps {wanted}, but those of model are {given}")
    for role, linear in linears.items():
        for parameter in module_of(linear).parameters():
            parameter.data = parameter.data.to(weights[role].dtype)
        linear.weight.copy_(weights[role])
        if linear.bias is not None:
            linear.bias.copy_(biases[role])
