"""What a user may name as MODEL, and how it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import memory
from .errors import CheckpointError, InvalidArgument
from .integrations.gguf import DEMO, demo_file, load_gguf
from .integrations.images import ProcessorTransform, Transform
from .integrations.timm import PREFIX as TIMM
from .integrations.timm import is_timm, is_timm_folder, load_timm, preprocessing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKPOINT_FILE = "fips.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_FOLDERS = "a folder saved by transformers (config.json and weights), a checkpoint folder of fips (fips.json)"
_ALLOWED = f"{_FOLDERS}, a .gguf file of the Llama architecture, or '{DEMO}'"
_ALLOWED_IMAGES = f"{_FOLDERS}, or '{TIMM}NAME' with its weights file"


def load_model(
    spec: str | Path, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[nn.Module, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        spec: a transformers folder, a ``.gguf`` file, a fips checkpoint folder, ``demo:smollm2``.
        dtype: of the weights; None keeps that of the file (float32 for GGUF).
        device: where the model goes, for example ``cpu`` or ``cuda``.

    Returns:
        ``(model in eval mode, tokenizer)``; the tokenizer is None where the source holds none.

    Raises:
        InvalidArgument: ``spec`` is none of these, or the device does not exist.
        CheckpointError: it is one, but it is damaged.
    """
    device = check_device(device)
    if str(spec).startswith(TIMM):
        raise InvalidArgument(f"model: {spec} is an image model; give --images, a folder of images")
    if str(spec) == DEMO:
        spec = demo_file()
    path = Path(spec)
    if path.is_file() and path.suffix == ".gguf":
        model, tokenizer = load_gguf(path, dtype)
    else:
        model, tokenizer = _load_folder(path, dtype, _ALLOWED), load_tokenizer(path)
        if not (hasattr(model, "can_generate") and model.can_generate()):
            raise InvalidArgument(
                f"model: {path} holds a {type(model).__name__}, which predicts no tokens; give a causal "
                "language model (…ForCausalLM), or --images for one that sees"
            )
    return model.to(device).eval(), tokenizer


def load_image_model(
    spec: str | Path,
    weights: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> tuple[nn.Module, Transform]:
    """Load a model of images and what it does to an image first.

    Args:
        spec: a transformers folder with its image processor, a fips checkpoint of such a model or of one of
            timm, or ``timm:NAME``.
        weights: file with the weights of ``timm:NAME``; None for any other.
        dtype: of the weights; None keeps that of the file.
        device: where the model goes.

    Returns:
        ``(model in eval mode, transform)``.

    Raises:
        InvalidArgument: ``spec`` is none of these, has no image processor, or the device does not exist.
        CheckpointError: it is one, but it is damaged.
    """
    device = check_device(device)
    if str(spec).startswith(TIMM):
        model = load_timm(str(spec).removeprefix(TIMM), weights, dtype)
    elif weights is not None:
        raise InvalidArgument(f"weights: belongs to {TIMM}NAME, and {str(spec)!r} has its own; leave it out")
    else:
        model = _load_folder(Path(spec), dtype, _ALLOWED_IMAGES)
    transform = preprocessing(model) if is_timm(model) else _processor(Path(spec))
    return model.to(device).eval(), transform


def reads_images(spec: str | Path) -> bool:
    """Whether a MODEL is one of images, by what its folder holds."""
    folder = Path(spec)
    has_processor = any((folder / name).is_file() for name in _PROCESSOR_FILES)
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    return str(spec).startswith(TIMM) or is_timm_folder(folder) or (has_processor and not has_tokenizer)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer saved in a folder, or None.

    Raises:
        CheckpointError: its files are there but unreadable.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for malformed files
        raise CheckpointError(
            f"{folder}: its tokenizer does not load ({_first_line(error)}); save it again"
        ) from error


def check_device(device: str) -> torch.device:
    """Parse a device and make sure that it exists.

    Raises:
        InvalidArgument: for a name torch does not know or a device this machine lacks.
    """
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise InvalidArgument(f"device: got {device!r}; allowed are 'cpu', 'cuda' and 'cuda:N'") from error
    if parsed.type not in ("cpu", "cuda"):
        raise InvalidArgument(f"device: got {device!r}; allowed are 'cpu', 'cuda' and 'cuda:N'")
    present = torch.cuda.device_count()
    if parsed.type == "cuda" and (parsed.index or 0) >= present:
        raise InvalidArgument(f"device: got {device!r}, but torch sees {present} CUDA devices; use 'cpu'")
    return parsed


def _load_folder(path: Path, dtype: torch.dtype | None, allowed: str) -> nn.Module:
    """Within ``memory.bounded`` a dense one stays in its files."""
    if (path / CHECKPOINT_FILE).is_file():
        from .checkpoint import from_pretrained

        return from_pretrained(path, dtype=dtype)
    if (path / "config.json").is_file():
        from .integrations.transformers import load_folder, map_folder

        return (map_folder if memory.is_bounded() else load_folder)(path, dtype)
    reason = "does not exist" if not path.exists() else "is not a model"
    raise InvalidArgument(f"model: {str(path)!r} {reason}; allowed are {allowed}")


def _processor(folder: Path) -> ProcessorTransform:
    if not any((folder / name).is_file() for name in _PROCESSOR_FILES):
        raise InvalidArgument(
            f"model: {folder} has no {_PROCESSOR_FILES[0]}, so its images cannot be prepared; save the image "
            "processor beside the model"
        )
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        return ProcessorTransform(processor)
    except ImportError:
        raise
    except Exception as error:  # its validators have exceptions of their own
        raise CheckpointError(
            f"{folder}: its image processor does not load ({_first_line(error)}); save it again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
