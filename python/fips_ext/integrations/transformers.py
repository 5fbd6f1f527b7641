"""Models of Hugging Face transformers: which class a config names, empty skeletons, folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from .. import memory
from .._tensor_files import TensorFiles
from ..errors import CheckpointError
from .skeleton import build_empty

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def model_class(config: PretrainedConfig) -> type[nn.Module]:
    """The class that ``config.architectures`` names.

    Raises:
        CheckpointError: it names none, or one that the installed transformers does not have.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    found = getattr(transformers, names[0], None) if names else None
    if not isinstance(found, type):
        raise CheckpointError(
            f"config.json: architectures is {names}, which is no class of transformers "
            f"{transformers.__version__}; install a version that has it, or build the model yourself and "
            "pass it as model="
        )
    return found


def empty_model(config: PretrainedConfig) -> nn.Module:
    """The model of ``config``, see :func:`~.skeleton.build_empty`."""
    construct = model_class(config)
    return build_empty(lambda: construct(config))


def load_folder(folder: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a folder saved by transformers, dense or compressed, with the class its config names.

    In eval mode.

    Args:
        folder: holds ``config.json`` and the weights.
        dtype: of the weights; None keeps that of the file.

    Raises:
        CheckpointError: the folder is not such a model, or leaves weights at their random initialisation.
    """
    from transformers import AutoConfig

    _check_folder(folder)
    options: dict[str, Any] = {"dtype": dtype or "auto", "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        model, loaded = model_class(config).from_pretrained(str(folder), output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"folder: transformers cannot load {str(folder)!r} ({error}); save or download it again"
        ) from error
    problems = {
        kind: sorted(map(str, loaded[kind]))
        for kind in ("missing_keys", "mismatched_keys")
        if loaded.get(kind)
    }
    if problems:
        raise CheckpointError(
            f"folder: {str(folder)!r} does not hold all weights of {type(model).__name__}: {problems}"
        )
    return model.eval()


def map_folder(folder: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Like :func:`load_folder`, of a dense model whose weights stay in their files until they are used.

    Within ``memory.bounded``.

    Args:
        dtype: of the weights; None keeps that of the files. Another one is written to scratch files.

    Raises:
        CheckpointError: the folder is not such a model, or its files do not hold the tensors under the names
            that its class has for them.
    """
    from transformers import AutoConfig

    _check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"folder: transformers cannot read {str(folder)!r} ({error}); save or download it again"
        ) from error
    if hasattr(config, "quantization_config"):
        raise CheckpointError(
            f"folder: {str(folder)!r} is quantised or compressed already; give the dense model"
        )
    model = empty_model(config)
    tensors = TensorFiles(Path(folder)).map()
    for name, tensor in tensors.items():
        if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
            tensors[name] = memory.keep(tensor.to(dtype))
            memory.relax()
    try:
        model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:  # another shape
        raise CheckpointError(f"folder: {str(folder)!r} does not fit its config.json ({error})") from error
    model.tie_weights()
    unset = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if unset:
        raise CheckpointError(
            f"folder: {str(folder)!r} holds no {unset[0]} of {type(model).__name__}, or under another name; "
            "load it, save it with transformers' save_pretrained, and give that folder"
        )
    return model.requires_grad_(False).eval()


def _check_folder(folder: str | Path) -> None:
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(
            f"folder: {str(folder)!r} has no config.json; pass a folder that transformers' "
            "save_pretrained wrote"
        )
