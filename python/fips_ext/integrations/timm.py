"""Image models of timm: named, with weights from a file, and written so that they are found again.

timm is imported by the functions that need it, and never by ``import fips_ext``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .._json import read_json
from ..errors import CheckpointError, InvalidArgument
from ..nn import SharedMLP
from ..surgery import AbsorbedLinear
from .skeleton import build_empty

PREFIX = "timm:"

Json = dict[str, Any]
_SUGGESTED = 5
_SEED = 0x66697073  # one that nobody else has made a model with
# What timm's preprocessing goes by; the rest of a pretrained_cfg is about where weights come from.
_DATA_FIELDS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
_ARGUMENTS = ("num_classes", "global_pool", "img_size", "in_chans")
# Where training scripts keep the weights in a file of theirs; averaged ones first, as timm takes them.
_STATE_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
# Attributes that change no output in eval mode.
_IRRELEVANT = re.compile(r"_|training$|p$|.*drop|.*checkpoint")
_HEADS = ("head.weight", "head.fc.weight", "head.projection.weight", "fc.weight", "classifier.weight")
# What timm raises for names, sizes and layouts that it does not know.
_TIMM_ERRORS = (RuntimeError, KeyError, ValueError, TypeError, AttributeError, AssertionError)


def is_timm(model: nn.Module) -> bool:
    """Whether ``model`` is a classifier or backbone of ``timm.create_model``."""
    config = getattr(model, "pretrained_cfg", None)
    return isinstance(config, dict) and "architecture" in config and type(_classes_of(model)) is int


def load_timm(name: str, weights: str | Path | None, dtype: torch.dtype | None = None) -> nn.Module:
    """A model of timm with the weights of a file, in eval mode.

    Args:
        name: of the model, as ``timm.list_models()`` has it.
        weights: a ``.safetensors`` or ``.pth`` file in any layout that timm converts for this model. The head
            gets as many classes as the file has.
        dtype: of the weights; None keeps that of the file.

    Raises:
        InvalidArgument: timm has no such model, or no file is given.
        CheckpointError: the file is no checkpoint of this model. Pickled objects are refused.
    """
    timm = _timm()
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        close = timm.list_models(f"*{architecture.partition('_')[0]}*")[:_SUGGESTED]
        hint = f"; similar are {', '.join(close)}" if close else ""
        raise InvalidArgument(f"model: timm {timm.__version__} has no {name!r}{hint}; see timm.list_models()")
    if weights is None:
        raise InvalidArgument(f"weights: timm's {name} is an architecture; give its weights file (--weights)")
    state = _read_state(Path(weights))
    try:
        classes = _classes_in(timm, name, state)
        sizes = {} if classes is None else {"num_classes": classes}
        overlay = {"state_dict": state, **sizes}
        fresh = _created(timm, name, pretrained=False, **sizes)
        model = _created(timm, name, pretrained=True, pretrained_cfg_overlay=overlay, **sizes)
    except _TIMM_ERRORS as error:
        raise CheckpointError(
            f"{weights}: does not fit timm's {name} ({_short(error)}); name the model it was saved from"
        ) from error
    if untouched := _equal_parameters(model, fresh):
        raise CheckpointError(
            f"{weights}: does not fit timm's {name}: it leaves {len(untouched)} parameters random, among "
            f"them {untouched[0]}; name the model it was saved from"
        )
    model.pretrained_cfg.pop("state_dict", None)  # else every copy of the model carries the dense weights
    floating = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    kept = floating.pop() if len(floating) == 1 else torch.float32
    return model.to(kept if dtype is None else dtype).eval()


def preprocessing(model: nn.Module) -> Any:
    """What timm does to an image before this model, at evaluation.

    Raises:
        InvalidArgument: the model does not read images of three colours.
    """
    timm = _timm()
    size = _input_size(model)
    if size[0] != 3:
        raise InvalidArgument(f"model: it reads {size[0]} channels; images of three colours are supported")
    found = timm.data.resolve_model_data_config(model)
    return timm.data.create_transform(**{**found, "input_size": size}, is_training=False)


def label_names(model: nn.Module) -> list[str] | None:
    """The WordNet ids of ImageNet's classes, if the model predicts those."""
    timm = _timm()
    subset = timm.data.infer_imagenet_subset(model)
    return timm.data.ImageNetInfo(subset).label_names() if subset else None


def timm_config(model: nn.Module) -> Json | None:
    """The ``config.json`` that :func:`empty_timm` builds ``model`` from; None where it cannot.

    That is tried, and compared with ``model``: what timm was told beyond the sizes recorded here (another
    number of heads, say) may change no shape, and would be lost without a word.
    """
    known = model.pretrained_cfg
    data = {name: known[name] for name in _DATA_FIELDS if known.get(name) is not None}
    sizes = _sizes(model)
    pooled = {**sizes, "global_pool": getattr(model, "global_pool", None)}
    for arguments in (sizes, pooled):
        config = {
            "library": "timm",
            "architecture": known["architecture"],
            "model_args": arguments,
            "data": data,
        }
        try:
            config = json.loads(json.dumps(config))
            if _same_structure(empty_timm(config), model):
                return config
        except (CheckpointError, TypeError, ValueError):
            continue
    return None


def is_timm_config(config: Any) -> bool:
    """Whether the content of a ``config.json`` is what :func:`timm_config` makes."""
    return isinstance(config, dict) and config.get("library") == "timm"


def is_timm_folder(folder: Path) -> bool:
    """Whether a folder holds such a ``config.json``."""
    try:
        return is_timm_config(read_json(folder / "config.json"))
    except (OSError, ValueError):
        return False


def empty_timm(config: Json) -> nn.Module:
    """The model of a ``config.json``, see :func:`~.skeleton.build_empty`.

    Raises:
        CheckpointError: the file asks for anything but a model of the installed timm.
    """
    timm = _timm()
    architecture, arguments, data = (config.get(key) for key in ("architecture", "model_args", "data"))
    # Names with a source in front make timm fetch, and other arguments make it read files.
    if not (isinstance(architecture, str) and timm.is_model(architecture)):
        raise CheckpointError(
            f"config.json: timm {timm.__version__} has no {architecture!r}; install the version that it was "
            "saved with, or pass model="
        )
    if not (isinstance(arguments, dict) and isinstance(data, dict) and set(arguments) <= {*_ARGUMENTS}):
        raise CheckpointError(
            f"config.json: model_args is {arguments!r}, allowed are {', '.join(_ARGUMENTS)}; copy or save it "
            "again"
        )
    overlay = {name: _tuple(data[name]) for name in _DATA_FIELDS if name in data}
    plain = {name: _tuple(value) for name, value in arguments.items()}
    try:
        return build_empty(
            lambda: timm.create_model(architecture, pretrained=False, pretrained_cfg_overlay=overlay, **plain)
        )
    except _TIMM_ERRORS as error:
        raise CheckpointError(
            f"config.json: timm {timm.__version__} cannot build {architecture!r} ({_short(error)}); install "
            "the version that it was saved with, or pass model="
        ) from error


def _timm() -> Any:
    try:
        import accelerate  # noqa: F401 - what is saved needs it; better said before the work than after
        import timm
        import timm.data
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        raise ImportError(
            "models of timm need the package, and a torchvision that belongs to this torch "
            f"({_short(error)}); pip install 'fips_ext[timm]'"
        ) from error
    return timm


def _created(timm: Any, name: str, **options: Any) -> nn.Module:
    """A new model; what is random in it is the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return timm.create_model(name, **options)


def _equal_parameters(model: nn.Module, fresh: nn.Module) -> list[str]:
    """Names of parameters that a file has left as random as in ``fresh``: timm does not always insist."""
    others = dict(fresh.named_parameters())

    def is_random(parameter: Tensor) -> bool:  # scales and biases may start, and stay, all alike
        return bool((parameter != parameter.flatten()[0]).any())

    named = model.named_parameters()
    return [name for name, p in named if name in others and torch.equal(p, others[name]) and is_random(p)]


def _classes_of(model: nn.Module) -> Any:
    return getattr(model, "num_classes", None)


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    """``(channels, height, width)`` of the images that a model was built for."""
    known = model.pretrained_cfg
    _, height, width = known.get("input_size") or (3, 224, 224)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(size, tuple | list) and len(size) == 2:
        height, width = size
    return _channels(model), int(height), int(width)


def _channels(model: nn.Module) -> int:
    first = model.pretrained_cfg.get("first_conv")
    first = first[0] if isinstance(first, tuple | list) else first
    try:
        return int(model.get_submodule(first).in_channels)
    except (AttributeError, TypeError):
        return int((model.pretrained_cfg.get("input_size") or (3,))[0])


def _sizes(model: nn.Module) -> Json:
    """Arguments of ``timm.create_model`` that differ from the defaults of the architecture."""
    known, size = model.pretrained_cfg, _input_size(model)
    arguments: Json = {"num_classes": _classes_of(model)}
    usual = tuple(known.get("input_size") or (3, 224, 224))
    if size[1:] != usual[1:]:
        arguments["img_size"] = list(size[1:])
    if size[0] != usual[0]:
        arguments["in_chans"] = size[0]
    return arguments


def _same_structure(empty: nn.Module, model: nn.Module) -> bool:
    """Whether two models differ in nothing but what was compressed: modules, shapes, plain attributes."""
    replaced = {n for n, m in model.named_modules() if isinstance(m, SharedMLP | AbsorbedLinear)}
    inside = tuple(f"{name}." for name in replaced)

    def facts(of: nn.Module) -> Json:
        found: Json = {}
        for name, module in of.named_modules():
            if name in replaced or name.startswith(inside):
                continue
            shapes = [(key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False)]
            plain = {k: v for k, v in vars(module).items() if not _IRRELEVANT.match(k) and _is_plain(v)}
            found[name] = (type(module).__name__, shapes, plain)
        return found

    return facts(empty) == facts(model)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, without the wrappings of training scripts."""
    if not path.is_file():
        raise InvalidArgument(f"weights: {path} is not a file; give a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything for a foreign file
        raise CheckpointError(
            f"{path}: is not a readable checkpoint of tensors ({_short(error)}); save its state_dict again, "
            "best as .safetensors"
        ) from error
    if isinstance(content, dict):
        content = next((content[k] for k in _STATE_KEYS if isinstance(content.get(k), dict)), content)
    named = isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())
    if not named or not content:
        raise CheckpointError(f"{path}: holds no state_dict of tensors; save model.state_dict()")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _classes_in(timm: Any, name: str, state: dict[str, Tensor]) -> int | None:
    """How many the head in the file has: 0 if there is none, None if it cannot be told."""
    head = getattr(timm.get_pretrained_cfg(name, allow_unregistered=True), "classifier", None)
    head = head[0] if isinstance(head, list | tuple) and head else head
    for key in (f"{head}.weight", *_HEADS):
        if key in state:
            return state[key].shape[0]
    return None if any("head" in key or "classifier" in key for key in state) else 0


def _tuple(value: Any) -> Any:
    """JSON knows lists only; timm compares sizes as tuples."""
    return tuple(value) if isinstance(value, list) else value


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
