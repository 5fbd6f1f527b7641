"""What a user may name as MODEL, and how it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import CheckpointError, InvalidArgument
from .integrations.gguf import DEMO, demo_file, load_gguf

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKPOINT_FILE = "fips.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_ALLOWED = (
    "a folder saved by transformers (config.json and weights), a .gguf file of the Llama "
    f"architecture, a checkpoint folder of fips (fips.json), or '{DEMO}'"
)


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
    if str(spec) == DEMO:
        spec = demo_file()
    path = Path(spec)
    if path.is_file() and path.suffix == ".gguf":
        model, tokenizer = load_gguf(path, dtype)
    elif (path / CHECKPOINT_FILE).is_file():
        from .checkpoint import from_pretrained

        model, tokenizer = from_pretrained(path, dtype=dtype), load_tokenizer(path)
    elif (path / "config.json").is_file():
        model, tokenizer = _load_transformers(path, dtype), load_tokenizer(path)
    else:
        reason = "does not exist" if not path.exists() else "is not a model"
        raise InvalidArgument(f"model: {str(spec)!r} {reason}; allowed are {_ALLOWED}")
    return model.to(device).eval(), tokenizer


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer saved in a folder, or None.

    Raises:
        CheckpointError: its files are there but unreadable.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
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


def _load_transformers(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    from .integrations.transformers import load_folder

    model = load_folder(folder, dtype)
    if not model.can_generate():
        raise InvalidArgument(
            f"model: {folder} holds a {type(model).__name__}, which predicts no tokens; "
            "give a causal language model (…ForCausalLM)"
        )
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
