"""A random Llama with a tokenizer of bytes: all that a command needs, without a download."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 256


@functools.cache
def byte_tokenizer() -> Any:
    """One token per byte, no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny_llama(**changes: Any) -> Any:
    """Four blocks, d = 64, n = 128, a tied head; ``changes`` override fields of its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()


def save_tiny_llama(folder: Path, **changes: Any) -> Path:
    """The model and its tokenizer as transformers saves them."""
    tiny_llama(**changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_text(path: Path) -> Path:
    """Some forty thousand characters in varied lines."""
    lines = (f"Line {i} says that {i} times {i + 1} is {i * (i + 1)}, or so they tell." for i in range(700))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
