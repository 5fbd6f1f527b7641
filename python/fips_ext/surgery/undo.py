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
    shared = shared_mlps(model)
    if not shared:
        raise InvalidArgument(f"model: {type(model).__name__} has no SharedMLP; it is dense already")
    first = next(iter(shared.values())).base.weight
    if into is None:
        into = _rebuilt(model)
    into.to(first.device, first.dtype)
    for dense in find_mlps(into):
        module = dict(model.named_modules()).get(dense.name)
        if not isinstance(module, SharedMLP):
            raise SurgeryError(f"into: {dense.name} is an MLP, but in model it is {type(module).__name__}")
        _fill(dense, module)
    state, wanted = model.state_dict(), into.state_dict()
    places = model.named_modules(remove_duplicate=False)
    replaced = tuple(f"{name}." for name, module in places if isinstance(module, SharedMLP | AbsorbedLinear))
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(replaced)}
    if stray := sorted(rest.keys() - wanted.keys()):
        raise SurgeryError(f"into: has no {', '.join(stray[:4])}; build it as model was built")
    into.load_state_dict(rest, strict=False)
    return into.train(model.training)


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
        return type(model)(config)


def _fill(dense: DenseMLP, shared: SharedMLP) -> None:
    biases = {"up": shared.up_bias, "gate": shared.gate_bias, "down": shared.down_bias}
    weights = shared.dense_weights()
    linears = dense.linears()
    wanted = {role: (tuple(m.weight.shape), m.bias is not None) for role, m in linears.items()}
    given = {role: (tuple(w.shape), biases[role] is not None) for role, w in weights.items()}
    if given != wanted:
        raise SurgeryError(f"into: {dense.name} has maps {wanted}, but those of model are {given}")
    for role, linear in linears.items():
        linear.weight.copy_(weights[role])
        if linear.bias is not None:
            linear.bias.copy_(biases[role])
