"""Saving and loading compressed models: ``model.safetensors``, ``config.json`` and ``fips.json``.

The files are described in docs/format.md. Loading never sees the dense weights: the model is built without
memory, its MLPs are replaced by empty ones of the recorded sizes, and the tensors are put in place.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ._atomic import replaced_directory
from ._json import read_json
from ._structure import (
    FORMAT_VERSION,
    Json,
    check_structure,
    describe,
    rebuild,
    restore_buffer_dtypes,
    retie,
)
from ._tensor_files import DTYPE_NAMES, INDEX, SHARD_BYTES, WEIGHTS, TensorFiles, write_tensors
from .errors import CheckpointError, InvalidArgument
from .integrations import timm as timm_models
from .model_card import model_card
from .nn.factor import SparseFactor
from .recipe import Recipe

_STRUCTURE, _CONFIG, _GENERATION, _CARD = (
    "fips.json",
    "config.json",
    "generation_config.json",
    "README.md",
)
_FLOATING = ("F64", "F32", "BF16", "F16")


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    *,
    recipe: Recipe | Json | None = None,
    report: Any = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a compressed model to ``directory``, all or nothing.

    Args:
        model: holds at least one ``SharedMLP``. A model of transformers or timm is saved with its config, so
            that :func:`from_pretrained` can build it; any other needs ``from_pretrained(model=...)``.
        recipe: the ``Recipe`` that made it.
        report: a JSON-able dict, or an object with ``to_dict()``.
        tokenizer: anything with ``save_pretrained(directory)``: a tokenizer or an image processor.
        overwrite: replace a checkpoint that is there; its whole directory goes once the new one is complete.
        shard_bytes: tensors of more than this together go to several files.

    Raises:
        CheckpointError: the directory holds something, the model is not compressed, or writing fails (then
            what was there is unchanged).
    """
    target = Path(directory)
    _check_target(target, overwrite)
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    structure = describe(model)
    tensors = _tensors_to_save(model, structure["tied"])
    from . import __version__  # the package imports this module

    document = {
        "format_version": FORMAT_VERSION,
        "fips_ext": __version__,
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "recipe": _jsonable("recipe", recipe),
        "report": _jsonable("report", report),
        **structure,
    }
    text = json.dumps(document, indent=1)
    try:
        with replaced_directory(target) as folder:
            write_tensors(tensors, folder, shard_bytes)
            (folder / _STRUCTURE).write_text(text, encoding="utf-8")
            for file in folder.glob("*.safetensors"):
                file.chmod((folder / _STRUCTURE).stat().st_mode)  # safetensors leaves 0600
            _save_config(model, structure, folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder))
            # Last: a tokenizer may bring a card of its own.
            card = model_card(document, info(folder)["ratios"], _library(folder))
            (folder / _CARD).write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        kept = "; the checkpoint that was there is unchanged" if target.exists() else ""
        raise CheckpointError(f"{target}: could not be written ({error}){kept}") from error


def from_pretrained(
    directory: str | Path,
    *,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a compressed model, in eval mode; the outputs equal those of the saved one bit by bit.

    Args:
        model: a freshly built dense model of the same architecture, which is changed in place; needed where
            neither transformers nor timm has it. Its weights do not matter and may be on the meta device.
        device: where the model goes.
        dtype: of the floating tensors; None keeps that of the file.

    Raises:
        CheckpointError: a file is missing, damaged, of a newer format, or does not fit the others.
    """
    folder = Path(directory)
    if dtype is not None and not dtype.is_floating_point:
        raise InvalidArgument(f"dtype: got {dtype}; expected a floating dtype such as torch.bfloat16")
    if model is None and _written_by_transformers(folder):
        from .integrations.transformers import load_folder

        return load_folder(folder, dtype).to(device)
    structure = _read_structure(folder)
    if model is None:
        model = _skeleton(folder, structure)
    rebuild(model, structure)
    files = TensorFiles(folder)
    tensors = _read_tensors(files, model, structure["tied"], torch.device(device), dtype)
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except (InvalidArgument, RuntimeError) as error:
        raise CheckpointError(f"{files.path}: damaged ({error}); copy or save it again") from error
    retie(model, structure)
    restore_buffer_dtypes(model, structure)
    unset = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if unset:
        raise CheckpointError(
            f"model: {_some(unset)} are on the meta device and in no checkpoint; build the model so "
            "that buffers outside the state_dict are real"
        )
    attach(model)
    return model.to(device).eval()


def info(directory: str | Path) -> Json:
    """What a checkpoint holds, without loading it.

    Returns:
        ``bytes`` per component (``bases``, ``values``, ``scales``, ``index``, ``masks``, ``biases``,
        ``other``), their ``total`` and the ``file`` with its header; ``dense_bytes`` and ``ratios`` for
        ``mlp``, ``block`` (every linear map of the blocks) and ``model``; ``recipe``, ``report``, ``mlps``
        (how many), ``bases``, ``format_version`` and ``fips_ext`` (the version that wrote it).

    Raises:
        CheckpointError: a file is missing, damaged or of a newer format.
    """
    folder = Path(directory)
    structure = _read_structure(folder)
    files = TensorFiles(folder)
    sizes = files.sizes()
    sums = dict.fromkeys(("bases", "values", "scales", "index", "masks", "biases", "other"), 0)
    components: dict[str, str] = {}
    dense = 0
    try:
        for entry in structure["mlps"]:
            names = _component_names(entry)
            components.update(names)
            value_bytes = sizes[f"{entry['base_owner']}.base.weight"][1]
            weights = len(entry["slices"]) * entry["width"] * entry["hidden"]
            bias_bytes = [sizes[name][0] for name, part in names.items() if part == "biases"]
            dense += weights * value_bytes + sum(bias_bytes)
        for name, (size, _) in sizes.items():
            sums[components.get(name, "other")] += size
        attention = int(structure["block_linear_bytes"])
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{folder}: {_STRUCTURE} and {files.path.name} do not fit ({type(error).__name__}: {error}); "
            "save it again"
        ) from error
    total = sum(sums.values())
    mlp = total - sums["other"]
    return {
        "format_version": structure["format_version"],
        "fips_ext": structure.get("fips_ext"),
        "recipe": structure.get("recipe"),
        "report": structure.get("report"),
        "mlps": len(structure["mlps"]),
        "bases": sum(part == "bases" for part in components.values()),
        "bytes": {**sums, "total": total, "file": files.nbytes()},
        "dense_bytes": {"mlp": dense, "block": dense + attention, "model": dense + sums["other"]},
        "ratios": {
            "mlp": mlp / dense,
            "block": (mlp + attention) / (dense + attention),
            "model": total / (dense + sums["other"]),
        },
    }


# -- writing ----------------------------------------------------------------------------------------


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse to touch anything but nothing, an empty directory, or (asked for) a checkpoint."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / _STRUCTURE).is_file():
        raise CheckpointError(
            f"directory: {str(target)!r} holds something that is not a checkpoint of fips_ext and is not "
            "replaced; choose a new directory"
        )
    if not overwrite:
        raise CheckpointError(
            f"directory: {str(target)!r} holds a checkpoint; pass overwrite=True to replace it, or choose a "
            "new directory"
        )


def _tensors_to_save(model: nn.Module, tied: dict[str, str]) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise CheckpointError(
                f"model: {name} is on the meta device and has no content; load the model before saving it"
            )
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"model: {name} is {tensor.dtype}; allowed are {', '.join(map(str, DTYPE_NAMES))}"
            )
        if name not in tied:
            tensors[name] = tensor
    return tensors


def _jsonable(name: str, value: Any) -> Any:
    plain = value.to_dict() if hasattr(value, "to_dict") else value
    try:
        json.dumps(plain)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"{name}: cannot be written as JSON ({error}); pass a dict of plain values, or an "
            "object with to_dict()"
        ) from error
    return plain


def _save_config(model: nn.Module, structure: Json, folder: Path) -> None:
    """The config of a transformers or timm model, and what it generates by; nothing for any other."""
    if timm_models.is_timm(model):
        if (timm_config := timm_models.timm_config(model)) is not None:
            (folder / _CONFIG).write_text(json.dumps(timm_config, indent=2) + "\n", encoding="utf-8")
        return
    config = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        return
    config = copy.deepcopy(config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.quantization_config = {"quant_method": "fips", "format_version": FORMAT_VERSION, **structure}
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def attach(model: nn.Module) -> None:
    """Let the ``save_pretrained`` of a transformers model write what it is now; nothing for any other."""
    if sys.modules.get("transformers") is not None:
        from .integrations.quantizer import attach as attach_to_transformers

        attach_to_transformers(model)


# -- reading ----------------------------------------------------------------------------------------


def _read_structure(folder: Path) -> Json:
    if not folder.is_dir():
        raise CheckpointError(
            f"directory: {str(folder)!r} does not exist; pass a directory that save_pretrained wrote"
        )
    for name, also in ((_STRUCTURE, _STRUCTURE), (WEIGHTS, INDEX)):
        if not (folder / name).is_file() and not (folder / also).is_file():
            raise CheckpointError(
                f"directory: {str(folder)!r} has no {name}; it is not a checkpoint of fips_ext, or a copy of "
                "it is incomplete"
            )
    path = folder / _STRUCTURE
    try:
        structure = read_json(path)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: is not the JSON that save_pretrained writes ({error}); copy or save it again"
        ) from error
    return check_structure(structure, str(path))


def _read_config(folder: Path) -> Any:
    """The content of ``config.json``; None where there is none, or none that is JSON."""
    try:
        return read_json(folder / _CONFIG)
    except (OSError, ValueError):
        return None


def _written_by_transformers(folder: Path) -> bool:
    """Whether a folder is what ``save_pretrained`` of transformers makes of a compressed model."""
    try:
        method = _read_config(folder)["quantization_config"]["quant_method"]
    except (TypeError, KeyError):
        return False
    return method == "fips" and not (folder / _STRUCTURE).exists()


def _library(folder: Path) -> str | None:
    """The library that has the class of a checkpoint."""
    config = _read_config(folder)
    return None if config is None else "timm" if timm_models.is_timm_config(config) else "transformers"


def _skeleton(folder: Path, structure: Json) -> nn.Module:
    if not (folder / _CONFIG).is_file():
        raise CheckpointError(
            f"directory: {str(folder)!r} has no {_CONFIG}, so {structure.get('model_class')} cannot be "
            "built; build it and pass it as model="
        )
    if timm_models.is_timm_config(config := _read_config(folder)):
        return timm_models.empty_timm(config)
    from transformers import GenerationConfig

    from .integrations.transformers import empty_model, read_config

    config = read_config(folder)
    # The dense class is built; its MLPs are replaced by what fips.json says.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = empty_model(config)
    if (folder / _GENERATION).is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # its validators have exceptions of their own
            raise CheckpointError(
                f"{folder / _GENERATION}: transformers cannot read it ({error}); copy or save it again"
            ) from error
    return model


def _read_tensors(
    files: TensorFiles,
    model: nn.Module,
    tied: dict[str, str],
    device: torch.device,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The tensors of the files under every ``state_dict`` name of ``model``, checked against it first."""
    expected = model.state_dict()
    if stray := [name for pair in tied.items() for name in pair if name not in expected]:
        raise CheckpointError(f"fips.json: the tied tensors {_some(stray)} are not in the model")
    _check_names(files.path, set(expected) - set(tied), set(files.stored))
    scales = {f"{name}.scales" for name, m in model.named_modules() if isinstance(m, SparseFactor)}
    for name, (path, stored, shape) in files.stored.items():
        _check_tensor(path, name, stored, shape, expected[name], name in scales)
    tensors = {}
    for name, tensor in files.read():
        cast = dtype if tensor.is_floating_point() and name not in scales else None
        # A copy: the file maps tensors at any address, while kernels like (and the last bits of a
        # matrix product depend on) the alignment of the allocator.
        tensors[name] = tensor.to(device=device, dtype=cast or tensor.dtype, copy=True)
    return {name: tensors[tied.get(name, name)] for name in expected}


def _check_names(path: Path, expected: set[str], stored: set[str]) -> None:
    if expected == stored:
        return
    missing, unexpected = sorted(expected - stored), sorted(stored - expected)
    raise CheckpointError(
        f"{path}: does not fit the model: missing {_some(missing)}, unexpected {_some(unexpected)}; "
        "config.json, fips.json and the weights must come from the same save"
    )


def _check_tensor(
    path: Path, name: str, stored: str, shape: list[int], expected: Tensor, exact: bool
) -> None:
    """``exact``: of a floating tensor, too, the dtype is part of the format."""
    wanted = list(expected.shape)
    any_float = expected.is_floating_point() and not exact
    fits = stored in _FLOATING if any_float else stored == DTYPE_NAMES.get(expected.dtype)
    if shape != wanted or not fits:
        raise CheckpointError(
            f"{path}: {name} is {stored} {shape}, but fips.json and config.json say {expected.dtype} "
            f"{wanted}; the files must come from the same save"
        )


def _component_names(entry: Json) -> dict[str, str]:
    """Component of each tensor name that one entry of ``fips.json`` stands for."""
    path = entry["paths"][0]
    names = {f"{path}.{role}_bias": "biases" for role in entry["biases"]}
    if path == entry["base_owner"]:
        names[f"{path}.base.weight"] = "bases"
        if entry["rank_out"] is not None:
            names[f"{path}.base_out.weight"] = "bases"
    for role, sizes in entry["slices"].items():
        names[f"{path}.{role}.values"] = "values"
        names[f"{path}.{role}.col_ptr"] = names[f"{path}.{role}.row_idx"] = "index"
        if sizes["encoding"] == "bitmap":
            names[f"{path}.{role}.mask"] = "masks"
        if sizes.get("bits") is not None:
            names[f"{path}.{role}.scales"] = "scales"
    return names


def _some(names: list[str], most: int = 4) -> str:
    """The first few of ``names``."""
    if not names:
        return "nothing"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
