"""What comes back from a checkpoint is what was saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fips_ext
from fips_ext.checkpoint import FORMAT_VERSION, from_pretrained, info, save_pretrained
from fips_ext.errors import CheckpointError
from fips_ext.nn.mlp import shared_mlps
from fips_ext.recipe import Recipe
from fips_ext.surgery import find_mlps

from ..tiny_models import CASES, PlainMLP, Stack, build, share
from .toy import compressed_toy, dense_toy, load_toy, save_toy

pytestmark = pytest.mark.usefixtures("single_thread")

_LOAD_AND_RUN = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from fips_ext.checkpoint import from_pretrained

root = Path(sys.argv[1])
inputs = load_file(root / "inputs.safetensors")
with torch.no_grad():
    save_file(
        {name: from_pretrained(root / name)(x)[0].contiguous() for name, x in inputs.items()},
        root / "outputs.safetensors",
    )
"""
_VARIANTS = {f"{name}-{dtype}": (name, dtype) for name in CASES for dtype in ("float32", "bfloat16")}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """Outputs of every case before saving, and of a fresh process that has the checkpoints only."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    inputs, before = {}, {}
    for key, (name, dtype) in _VARIANTS.items():
        model, x = build(name)
        model.to(getattr(torch, dtype))
        inputs[key] = x.to(model.dtype) if x.is_floating_point() else x
        share(model, rank=4, encoding="bitmap" if dtype == "float32" else "block")
        with torch.no_grad():
            before[key] = model(inputs[key])[0]
        save_pretrained(model, root / key)
    save_file(inputs, root / "inputs.safetensors")
    package = str(Path(fips_ext.__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    subprocess.run(
        [sys.executable, "-c", _LOAD_AND_RUN, str(root)],
        check=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        timeout=120,
    )
    after = load_file(root / "outputs.safetensors")
    return {key: (before[key], after[key]) for key in _VARIANTS}


@pytest.mark.parametrize("key", _VARIANTS)
def test_a_fresh_process_computes_the_same_bits(key: str, outputs: dict[str, tuple]) -> None:
    before, after = outputs[key]
    assert before.dtype == after.dtype
    assert torch.equal(before, after)


def test_a_model_transformers_does_not_know(tmp_path: Path) -> None:
    model = save_toy(tmp_path / "toy")
    loaded = load_toy(tmp_path / "toy")
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert not loaded.training
    first, *others = shared_mlps(loaded).values()
    assert all(mlp.base is first.base and mlp.base_out is first.base_out for mlp in others)
    assert [mlp.owns_base for mlp in shared_mlps(loaded).values()] == [True, False, False]


def test_the_skeleton_may_have_no_memory(tmp_path: Path) -> None:
    model = save_toy(tmp_path / "toy")
    with torch.device("meta"):
        skeleton = dense_toy()
    loaded = from_pretrained(tmp_path / "toy", model=skeleton)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_an_empty_base_and_an_empty_slice(tmp_path: Path) -> None:
    model = Stack(PlainMLP(bias=False), PlainMLP(bias=False)).eval()
    nn.init.zeros_(model.blocks[1].mlp.fc1.weight)
    share(model, rank=0)
    save_pretrained(model, tmp_path / "toy")
    loaded = from_pretrained(tmp_path / "toy", model=Stack(PlainMLP(bias=False), PlainMLP(bias=False)))
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_one_mlp_in_two_places_is_stored_once(tmp_path: Path) -> None:
    def dense() -> nn.Module:
        repeated = PlainMLP()
        return Stack(repeated, PlainMLP(), repeated)

    model = dense().eval()
    share(model, rank=4)
    save_pretrained(model, tmp_path / "toy")
    stored = load_file(tmp_path / "toy" / "model.safetensors")
    assert not any(name.startswith("blocks.2.mlp.") for name in stored)
    loaded = from_pretrained(tmp_path / "toy", model=dense())
    assert loaded.blocks[0].mlp is loaded.blocks[2].mlp
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_a_tied_head_is_stored_once_and_tied_again(tmp_path: Path) -> None:
    model, _ = build("llama")
    share(model)
    save_pretrained(model, tmp_path / "llama")
    stored = load_file(tmp_path / "llama" / "model.safetensors")
    assert ("lm_head.weight" in stored) != ("model.embed_tokens.weight" in stored)
    loaded = from_pretrained(tmp_path / "llama")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_files(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    model, _ = build("llama")
    share(model)
    recipe = Recipe(ratio=0.5, seed=7)
    save_pretrained(model, tmp_path / "llama", recipe=recipe, report={"error": 0.25}, tokenizer=Tokenizer())
    assert {path.name for path in (tmp_path / "llama").iterdir()} == {
        "model.safetensors",
        "config.json",
        "fips.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
    }
    document = json.loads((tmp_path / "llama" / "fips.json").read_text())
    assert document["format_version"] == FORMAT_VERSION
    assert document["fips_ext"] == fips_ext.__version__
    assert Recipe.from_dict(document["recipe"]) == recipe
    assert document["report"] == {"error": 0.25}
    card = (tmp_path / "llama" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "LlamaForCausalLM.from_pretrained" in card
    assert f"| MLPs | {info(tmp_path / 'llama')['ratios']['mlp']:.4f} |" in card
    assert '"seed": 7' in card
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    # All that transformers needs: it reads no fips.json.
    structure = {key: document[key] for key in config["quantization_config"].keys() - {"quant_method"}}
    assert config["quantization_config"] == {"quant_method": "fips", **structure}
    assert structure.keys() >= {"format_version", "mlps", "absorbed", "tied"}
    assert not hasattr(model.config, "quantization_config")


def test_the_generation_config_comes_back(tmp_path: Path) -> None:
    model, _ = build("llama")
    model.generation_config.max_new_tokens = 17
    share(model)
    save_pretrained(model, tmp_path / "llama")
    assert from_pretrained(tmp_path / "llama").generation_config.max_new_tokens == 17


def test_a_loaded_model_can_be_saved_again(tmp_path: Path) -> None:
    model, inputs = build("bert")
    share(model, rank=4)
    save_pretrained(model, tmp_path / "first")
    save_pretrained(from_pretrained(tmp_path / "first"), tmp_path / "second")
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path / "second")(inputs)[0], model(inputs)[0])


def test_dtype_casts_weights_and_not_the_index(tmp_path: Path) -> None:
    model = save_toy(tmp_path / "toy")
    loaded = load_toy(tmp_path / "toy", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    up, saved = loaded.blocks[0].mlp.up, model.blocks[0].mlp.up
    assert torch.equal(up.values, saved.values.bfloat16())
    assert torch.equal(up.row_idx, saved.row_idx)
    assert torch.equal(up.mask, saved.mask)


def test_loading_leaves_the_random_state(tmp_path: Path) -> None:
    model, _ = build("vit")
    share(model)
    save_pretrained(model, tmp_path / "vit")
    state = torch.get_rng_state()
    from_pretrained(tmp_path / "vit")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loaded_model_trains(tmp_path: Path) -> None:
    save_toy(tmp_path / "toy")
    loaded = load_toy(tmp_path / "toy").train()
    loaded(torch.randn(2, 5, 32)).square().sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_views_are_saved_without_what_they_look_into(tmp_path: Path) -> None:
    model = compressed_toy()
    pool = torch.randn(1000)
    bias = model.blocks[0].mlp.up_bias
    bias.data = pool[: bias.numel()]
    save_pretrained(model, tmp_path / "toy")
    assert torch.equal(load_toy(tmp_path / "toy").blocks[0].mlp.up_bias, bias)
    assert (tmp_path / "toy" / "model.safetensors").stat().st_size < 100_000


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("encoding", ["bitmap", "block"])
def test_codes_come_back_in_any_dtype(tmp_path: Path, bits: int, encoding: str) -> None:
    model = dense_toy().eval()
    share(model, rank=8, encoding=encoding)
    for mlp in shared_mlps(model).values():
        for factor in mlp.factors().values():
            factor.round_to(bits)
            factor.quantise()
    x = torch.randn(3, 32)
    save_pretrained(model, tmp_path / "codes")
    loaded = load_toy(tmp_path / "codes")
    assert torch.equal(loaded(x), model(x))
    assert {f.bits for m in shared_mlps(loaded).values() for f in m.factors().values()} == {bits}
    low = load_toy(tmp_path / "codes", dtype=torch.bfloat16)
    assert torch.equal(low(x.bfloat16()), model.bfloat16()(x.bfloat16()))
    facts = info(tmp_path / "codes")
    scales = sum(t.nbytes for n, t in model.state_dict().items() if n.endswith(".scales"))
    assert facts["bytes"]["scales"] == scales > 0
    linears = [linear for mlp in find_mlps(dense_toy()) for linear in mlp.linears().values()]
    dense = sum(p.nbytes for linear in linears for p in linear.parameters())
    assert facts["dense_bytes"]["mlp"] == dense


def test_values_that_are_to_be_rounded_are_not_saved(tmp_path: Path) -> None:
    model = dense_toy().eval()
    share(model, rank=8)
    next(iter(shared_mlps(model).values())).down.round_to(4)
    with pytest.raises(CheckpointError, match="4 bits, but still holds values"):
        save_pretrained(model, tmp_path / "codes")


def test_scales_of_another_dtype_are_refused(tmp_path: Path) -> None:
    model = dense_toy().eval()
    share(model, rank=8)
    for mlp in shared_mlps(model).values():
        for factor in mlp.factors().values():
            factor.round_to(8)
            factor.quantise()
    save_pretrained(model, tmp_path / "codes")
    path = tmp_path / "codes" / "model.safetensors"
    tensors = {n: t.float() if n.endswith(".scales") else t for n, t in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"scales is F32"):
        load_toy(tmp_path / "codes")
