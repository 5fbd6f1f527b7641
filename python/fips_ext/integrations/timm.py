"""Image models of timm: named, with weights from a file, and written so that they are found again.

timm is imported by the functions that need it, and never by ``import fips_ext``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, InvalidArgument

PREFIX = "timm:"

_SUGGESTED = 5
# What timm's preprocessing goes by; the rest of a pretrained_cfg is about where weights come from.
_DATA_FIELDS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "classifier")


def is_timm(model: nn.Module) -> bool:
    """Whether ``model`` was made by ``timm.create_model``."""
    return isinstance(getattr(model, "pretrained_cfg", None), dict) and "architecture" in model.pretrained_cfg


def load_timm(name: str, weights: str | Path | None) -> nn.Module:
    """A model of timm with the weights of a file, in eval mode.

    Args:
        name: of the model, as ``timm.list_models()`` has it.
        weights: a ``.safetensors`` or ``.pth`` file in any layout that timm converts for this model. The head
            gets as many classes as the file has.

    Raises:
        InvalidArgument: timm has no such model, or no file is given.
        CheckpointError: the file is no checkpoint of this model. Pickled objects are refused.
    """
    timm = _timm()
    if not timm.is_model(name.partition(".")[0]):
        close = timm.list_models(f"*{name.partition('.')[0].partition('_')[0]}*")[:_SUGGESTED]
        hint = f"; similar are {', '.join(close)}" if close else ""
        raise InvalidArgument(f"model: timm {timm.__version__} has no {name!r}{hint}; see timm.list_models()")
    if weights is None:
        raise InvalidArgument(f"weights: timm's {name} is an architecture; give its weights file (--weights)")
    state = _read_state(Path(weights))
    config: dict[str, Any] = {"state_dict": state}
    classes = _classes(timm, name, state)
    if classes is not None:
        config["num_classes"] = classes
    options = {} if classes is None else {"num_classes": classes}
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=config, **options)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{weights}: does not fit timm's {name} ({_short(error)}); name the model it was saved from"
        ) from error
    model.pretrained_cfg.pop("state_dict", None)  # else every copy of the model carries the dense weights
    return model.eval()


def preprocessing(model: nn.Module) -> Any:
    """What timm does to an image before this model, at evaluation."""
    timm = _timm()
    return timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)


def label_names(model: nn.Module) -> list[str] | None:
    """The folder names of ImageNet's classes, if the model predicts those."""
    timm = _timm()
    subset = timm.data.infer_imagenet_subset(model)
    return timm.data.ImageNetInfo(subset).label_names() if subset else None


def save_config(model: nn.Module, folder: Path) -> None:
    """Write ``config.json`` in the form of timm's own folders."""
    known = model.pretrained_cfg
    arguments: dict[str, Any] = {"num_classes": model.num_classes}
    patches = getattr(model, "patch_embed", None)
    size = getattr(patches, "img_size", None)
    if size is not None and "input_size" in known and tuple(size) != tuple(known["input_size"][1:]):
        arguments["img_size"] = list(size)
    channels = getattr(getattr(patches, "proj", None), "in_channels", None)
    if channels is not None and "input_size" in known and channels != known["input_size"][0]:
        arguments["in_chans"] = channels
    config = {
        "architecture": known["architecture"],
        "num_classes": model.num_classes,
        "model_args": arguments,
        "pretrained_cfg": {name: known[name] for name in _DATA_FIELDS if known.get(name) is not None},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def is_timm_config(config: Any) -> bool:
    """Whether the content of a ``config.json`` is what :func:`save_config` writes."""
    return (
        isinstance(config, dict)
        and isinstance(config.get("architecture"), str)
        and isinstance(config.get("model_args"), dict)
    )


def is_timm_folder(folder: Path) -> bool:
    """Whether the ``config.json`` of a folder is what :func:`save_config` writes."""
    try:
        return is_timm_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def empty_timm(config: dict[str, Any]) -> nn.Module:
    """The model of a ``config.json`` with its parameters on the meta device and its buffers real.

    Raises:
        CheckpointError: the installed timm does not build it.
    """
    timm = _timm()
    from accelerate import init_empty_weights

    data = config.get("pretrained_cfg")
    data = _tuples(data) if isinstance(data, dict) else None
    try:
        with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
            return timm.create_model(
                config["architecture"],
                pretrained=False,
                pretrained_cfg_overlay=data,
                **_tuples(config["model_args"]),
            )
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"config.json: timm {timm.__version__} cannot build {config['architecture']!r} "
            f"({_short(error)}); install the version that it was saved with, or pass model="
        ) from error


def _timm() -> Any:
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise ImportError(
            f"models of timm need the package ({error}); pip install 'fips_ext[timm]'"
        ) from error
    return timm


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    from timm.models import load_state_dict

    if not path.is_file():
        raise InvalidArgument(f"weights: {path} is not a file; give a .safetensors or .pth file")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # torch.load raises nearly anything for a damaged or foreign file
        raise CheckpointError(
            f"{path}: is not a readable checkpoint of tensors ({_short(error)}); save its state_dict again, "
            "best as .safetensors"
        ) from error
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds no state_dict of tensors; save model.state_dict()")
    return state


def _classes(timm: Any, name: str, state: dict[str, torch.Tensor]) -> int | None:
    """How many the head in the file has: none for 0, None if it cannot be told."""
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    head = getattr(known, "classifier", None)
    head = head[0] if isinstance(head, list | tuple) and head else head
    if not isinstance(head, str):
        return None
    weight = state.get(f"{head}.weight")
    if weight is not None:
        return weight.shape[0]
    # Backbones of timm come without a head; files of other origin may name theirs otherwise.
    return 0 if "norm.weight" in state or "fc_norm.weight" in state else None


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON knows lists only; timm compares sizes as tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
