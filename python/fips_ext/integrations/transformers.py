"""Models of Hugging Face transformers: which class a config names, empty skeletons, folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import memory
from .._tensor_files import TensorFiles
from ..errors import CheckpointError, FipsError
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
    named = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    found = getattr(transformers, named, None) if named else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"config.json: architectures is {names}, which is no class of transformers "
            f"{transformers.__version__}; install a version that has it, or build the model yourself and "
            "pass it as model="
        )
    return found


def empty_model(config: PretrainedConfig) -> nn.Module:
    """The model of ``config``, see :func:`~.skeleton.build_empty`.

    Raises:
        CheckpointError: the config names no model, or not one that can be built.
    """
    construct = model_class(config)
    try:
        return build_empty(lambda: construct(config))
    except ImportError:
        raise
    except Exception as error:  # whatever a class makes of numbers that are none
        raise CheckpointError(
            f"config.json: no {construct.__name__} can be built from it ({type(error).__name__}: {error}); "
            "copy or save it again"
        ) from error


def read_config(folder: str | Path) -> PretrainedConfig:
    """The config of a folder; no code of the folder is run.

    Raises:
        CheckpointError: transformers cannot read it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its validators have exceptions of their own
        raise CheckpointError(
            f"{Path(folder) / 'config.json'}: transformers cannot read it ({type(error).__name__}: {error}); "
            "copy or save it again"
        ) from error


def load_folder(folder: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a folder saved by transformers, dense or compressed, with the class its config names.

    In eval mode.

    Args:
        folder: holds ``config.json`` and the weights.
        dtype: of the weights; None keeps that of the file.

    Raises:
        CheckpointError: the folder is not such a model, or leaves weights at their random initialisation.
    """
    _check_folder(folder)
    options: dict[str, Any] = {
        "dtype": dtype or "auto",
        "local_files_only": True,
        "trust_remote_code": False,
    }
    config = read_config(folder)
    try:
        model, loaded = model_class(config).from_pretrained(str(folder), output_loading_info=True, **options)
    except (FipsError, ImportError):
        raise
    except Exception as error:  # whatever its classes make of a damaged folder
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
        dtype: of the weights; None is that of the config, or of the files. Where they have another, they are
            written to scratch files.

    Raises:
        CheckpointError: the folder is not such a model, or its files do not hold the tensors under the names
            that its class has for them.
    """
    _check_folder(folder)
    config = read_config(folder)
    if hasattr(config, "quantization_config"):
        raise CheckpointError(
            f"folder: {str(folder)!r} is quantised or compressed already; give the dense model"
        )
    model = empty_model(config)
    dtype = dtype or getattr(config, "dtype", None)
    tensors = TensorFiles(Path(folder)).map()
    for name, tensor in tensors.items():
        if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
            tensors[name] = memory.keep(tensor.to(dtype))
            memory.relax()
    try:
        missing = set(model.load_state_dict(tensors, strict=False, assign=True).missing_keys)
    except RuntimeError as error:  # another shape
        raise CheckpointError(f"folder: {str(folder)!r} does not fit its config.json ({error})") from error
    model.tie_weights(missing_keys=set(missing))  # what the files hold is not tied to anything else
    never_read = missing & {name for name, _ in model.named_buffers()}
    unset = [name for name, tensor in model.state_dict().items() if tensor.is_meta or name in never_read]
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
