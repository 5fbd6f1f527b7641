"""The structure of a compressed model as JSON, and the empty model it describes.

``fips.json`` holds what the tensors cannot say: which modules are a ``SharedMLP``, who owns its bases, the
sizes of each slice, which linear maps were absorbed and which tensors are one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError, InvalidArgument
from .nn import SharedBase, SharedMLP, SparseFactor
from .surgery import AbsorbedLinear
from .surgery.linear_map import is_conv1d

Json = dict[str, Any]
FORMAT_VERSION = 2  # 2: slices may hold codes
_ROLES = ("up", "gate", "down")
_MOST = 2**40  # no size of a model is near
_SECTIONS = {
    "mlps": list,
    "absorbed": list,
    "tied": dict,
    "buffer_dtypes": dict,
    "block_linear_bytes": int,
}


def check_structure(structure: Any, where: str) -> Json:
    """``structure``, if this version reads it; else a ``CheckpointError`` that begins with ``where``."""
    if not isinstance(structure, dict) or "format_version" not in structure:
        raise CheckpointError(f"{where}: is not the JSON that save_pretrained writes; copy or save it again")
    version = structure["format_version"]
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version is {version!r}, and this fips_ext reads up to {FORMAT_VERSION}; "
            "upgrade fips_ext"
        )
    wrong = [key for key, kind in _SECTIONS.items() if not isinstance(structure.get(key), kind)]
    if not wrong and (
        not structure["mlps"]
        or structure["block_linear_bytes"] < 0
        or not all(_is_mlp(entry) for entry in structure["mlps"])
    ):
        wrong = ["mlps"] if structure["block_linear_bytes"] >= 0 else ["block_linear_bytes"]
    if wrong:
        raise CheckpointError(f"{where}: {wrong} are missing or malformed; copy or save it again")
    return structure


def _is_mlp(entry: Any) -> bool:
    """Whether an entry of ``mlps`` has the fields, of the kinds and in the ranges, that the format says."""
    if not isinstance(entry, dict) or not isinstance(entry.get("slices"), dict):
        return False
    paths, biases, slices = entry.get("paths"), entry.get("biases"), entry["slices"]
    return (
        isinstance(paths, list)
        and bool(paths)
        and all(isinstance(path, str) for path in (*paths, entry.get("base_owner"), entry.get("activation")))
        and _is_size(entry.get("width"), 1)
        and _is_size(entry.get("hidden"), 1)
        and isinstance(entry.get("identity"), bool)
        and _is_size(entry.get("rank"))
        and (entry.get("rank_out", 0) is None or _is_size(entry.get("rank_out")))
        and isinstance(biases, list)
        and all(role in _ROLES for role in biases)
        and {"up", "down"} <= set(slices) <= set(_ROLES)
        and all(_is_slice(sizes) for sizes in slices.values())
    )


def _is_slice(sizes: Any) -> bool:
    return (
        isinstance(sizes, dict)
        and all(_is_size(sizes.get(key)) for key in ("rows", "cols", "num_blocks", "num_values"))
        and isinstance(sizes.get("block"), list)
        and len(sizes["block"]) == 2
        and all(_is_size(edge, 1) for edge in sizes["block"])
        and sizes.get("encoding") in ("block", "bitmap")
        and sizes.get("bits") in (None, 4, 8)
    )


def _is_size(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < _MOST


def describe(model: nn.Module) -> Json:
    """The structure of ``model``.

    Raises:
        CheckpointError: it has no ``SharedMLP``, or one whose bases belong to no ``SharedMLP`` of the model.
    """
    paths: dict[SharedMLP, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SharedMLP):
            paths.setdefault(module, []).append(path)
    if not paths:
        raise CheckpointError(
            f"model: {type(model).__name__} has no SharedMLP; compress it first, or save a dense model with "
            "its own save_pretrained"
        )
    owners = {(id(m.base), id(m.base_out)): places[0] for m, places in paths.items() if m.owns_base}
    mlps = []
    for mlp, places in paths.items():
        owner = owners.get((id(mlp.base), id(mlp.base_out)))
        if owner is None:
            raise CheckpointError(
                f"model: the bases of {places[0]} belong to no SharedMLP of this model; save the whole "
                "model, with the layer that owns them"
            )
        mlps.append(_describe_mlp(mlp, places, owner))
    return {
        "mlps": mlps,
        "absorbed": _paths_of(model, AbsorbedLinear),
        "tied": tied_names(model),
        "buffer_dtypes": _unsaved_buffer_dtypes(model),
        "block_linear_bytes": _block_linear_bytes(model, [p[0] for p in paths.values()]),
    }


def fitted(model: nn.Module, structure: Json, prefix: str) -> Json:
    """The structure for ``model``, where it was written for the same one with a head, or without.

    transformers loads the backbone of a model with a head, and a backbone into a model with a head, by adding
    or taking away the name under which the latter holds it.

    Args:
        prefix: that name.
    """
    path = str(structure["mlps"][0].get("paths", [""])[0]) if structure["mlps"] else ""
    if not prefix or _has(model, path):
        return structure
    if _has(model, f"{prefix}.{path}"):
        return _renamed(structure, lambda name: f"{prefix}.{name}")
    if path.startswith(f"{prefix}.") and _has(model, path[len(prefix) + 1 :]):
        return _renamed(structure, lambda name: name.removeprefix(f"{prefix}."))
    return structure


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _renamed(structure: Json, name: Callable[[str], str]) -> Json:
    mlps = [
        {**mlp, "paths": [name(path) for path in mlp["paths"]], "base_owner": name(mlp["base_owner"])}
        for mlp in structure["mlps"]
    ]
    return {
        **structure,
        "mlps": mlps,
        "absorbed": [name(path) for path in structure["absorbed"]],
        "tied": {name(alias): name(kept) for alias, kept in structure["tied"].items()},
        "buffer_dtypes": {name(buffer): dtype for buffer, dtype in structure["buffer_dtypes"].items()},
    }


def rebuild(model: nn.Module, structure: Json, where: str = "fips.json", *, replaces: bool = True) -> None:
    """Put empty ``SharedMLP`` modules (on the meta device) into a dense ``model``, in place.

    Args:
        where: the structure is from, for messages.
        replaces: what stands there now must be an MLP of the same sizes: no size is taken from a file alone.

    Raises:
        CheckpointError: the structure is malformed or does not fit the model.
    """
    built: dict[str, SharedMLP] = {}
    try:
        # Owners first: the others need their bases.
        for entry in sorted(structure["mlps"], key=lambda e: e["paths"][0] != e["base_owner"]):
            owner = built.get(entry["base_owner"])
            if owner is None and entry["paths"][0] != entry["base_owner"]:
                raise CheckpointError(
                    f"{where}: {entry['paths'][0]} names {entry['base_owner']} as the owner of its bases, "
                    "which owns none; the file was edited or is damaged, save the model again"
                )
            mlp = _empty_mlp(entry, owner)
            built[entry["paths"][0]] = mlp
            for path in entry["paths"]:
                if replaces:
                    _check_replaced(model.get_submodule(path), entry, where)
                _replace(model, path, mlp)
        for path in structure["absorbed"]:
            _replace(model, path, AbsorbedLinear())
    except (
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        RuntimeError,
        InvalidArgument,
    ) as error:
        raise CheckpointError(
            f"{where}: does not describe this model ({type(error).__name__}: {error}); it was edited, or "
            "config.json or model= is of another model"
        ) from error


def retie(model: nn.Module, structure: Json) -> None:
    """Make tensors one again that were one when the model was saved."""
    for alias, kept in structure["tied"].items():
        parent, _, name = alias.rpartition(".")
        kept_parent, _, kept_name = kept.rpartition(".")
        source = model.get_submodule(kept_parent)
        target = model.get_submodule(parent)
        if kept_name in source._parameters:
            target._parameters[name] = source._parameters[kept_name]
        else:
            target._buffers[name] = source._buffers[kept_name]


def restore_buffer_dtypes(model: nn.Module, structure: Json) -> None:
    """Cast buffers outside the ``state_dict`` as they were; a rebuilt model has them in full precision."""
    buffers = dict(model.named_buffers())
    for name, dtype in structure["buffer_dtypes"].items():
        if name in buffers:
            wanted = getattr(torch, str(dtype), None)
            if not isinstance(wanted, torch.dtype):
                raise CheckpointError(f"fips.json: {dtype!r}, the dtype of {name}, is none of torch's")
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = buffers[name].to(wanted)


def tied_names(model: nn.Module) -> dict[str, str]:
    """``state_dict`` names of tensors that repeat an earlier one, each with the first name."""
    first: dict[tuple, str] = {}
    tied = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"model: {name} is a {type(tensor).__name__}, and only tensors can be saved; "
                "remove that state"
            )
        kept = first.setdefault(_identity(tensor), name)
        if kept != name:
            tied[name] = kept
    return tied


def _identity(tensor: Tensor) -> tuple:
    """Equal for tensors over the same memory; empty tensors have none, so they stand for themselves."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _describe_mlp(mlp: SharedMLP, places: list[str], owner: str) -> Json:
    biases = {"up": mlp.up_bias, "gate": mlp.gate_bias, "down": mlp.down_bias}
    return {
        "paths": places,
        "base_owner": owner,
        "width": mlp.width,
        "hidden": mlp.hidden,
        "identity": mlp.base.identity,
        "rank": mlp.base.rank,
        "rank_out": None if mlp.base_out is None else mlp.base_out.rank,
        "activation": mlp.activation,
        "biases": [role for role, bias in biases.items() if bias is not None],
        "slices": {role: _describe_factor(factor) for role, factor in mlp.factors().items()},
    }


def _describe_factor(factor: SparseFactor) -> Json:
    if factor.rounding is not None:
        raise CheckpointError(
            f"model: a slice is to be rounded to codes of {factor.rounding.bits} bits, but still holds "
            "values; call its quantise() first"
        )
    layout = factor.slice()
    return {
        "rows": layout.rows,
        "cols": layout.cols,
        "block": list(layout.block),
        "encoding": layout.encoding,
        "num_blocks": layout.num_blocks,
        "num_values": layout.values.numel(),
        "bits": layout.bits,
    }


def _empty_mlp(entry: Json, owner: SharedMLP | None) -> SharedMLP:
    width, hidden = entry["width"], entry["hidden"]
    if any(sizes["cols"] != hidden for sizes in entry["slices"].values()):
        raise InvalidArgument(f"slices of {entry['paths'][0]}: cols is not the hidden width {hidden}")
    with torch.device("meta"):
        slices = {
            role: SparseFactor.empty(**{**sizes, "block": tuple(sizes["block"])})
            for role, sizes in entry["slices"].items()
        }
        sizes = {"up": hidden, "gate": hidden, "down": width}
        biases = {f"{role}_bias": torch.empty(sizes[role]) for role in entry["biases"]}
        if owner is None:
            base = SharedBase.empty(width, entry["rank"], entry["identity"])
            rank_out = entry["rank_out"]
            base_out = None if rank_out is None else SharedBase.empty(width, rank_out, entry["identity"])
        else:
            base, base_out = owner.base, owner.base_out
        return SharedMLP(
            base,
            base_out=base_out,
            up=slices["up"],
            gate=slices.get("gate"),
            down=slices["down"],
            activation=entry["activation"],
            owns_base=owner is None,
            **biases,
        )


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    model.get_submodule(path)  # raises AttributeError that names what is missing
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent).register_module(name, module)


def _check_replaced(module: nn.Module, entry: Json, where: str) -> None:
    """Raise ``CheckpointError`` unless ``module`` holds a map ``[hidden, width]``, or two of them in one."""
    width, hidden = entry["width"], entry["hidden"]
    shapes = {tuple(p.shape) for p in module.parameters() if p.dim() == 2}
    wanted = {shape for n in (hidden, 2 * hidden) for shape in ((n, width), (width, n))}
    if not shapes & wanted and not isinstance(module, SharedMLP):
        raise CheckpointError(
            f"{where}: {entry['paths'][0]} is {hidden} × {width}, but the model has {sorted(shapes)} there; "
            "config.json or model= is of another model"
        )


def _paths_of(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    named = model.named_modules(remove_duplicate=False)
    return [path for path, module in named if isinstance(module, kind)]


def _unsaved_buffer_dtypes(model: nn.Module) -> dict[str, str]:
    saved = model.state_dict()
    return {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in model.named_buffers()
        if name not in saved and buffer.is_floating_point()
    }


def _block_linear_bytes(model: nn.Module, mlp_paths: list[str]) -> int:
    """Bytes of the linear maps left dense in the blocks that hold a ``SharedMLP`` (attention)."""
    blocks = [match[0] for path in mlp_paths if (match := re.match(r".*?\b\d+\.", path))]
    parameters = {
        id(p): p.numel() * p.element_size()
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and path.startswith(tuple(blocks))
        for p in module.parameters()
    }
    return sum(parameters.values())
