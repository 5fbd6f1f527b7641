"""transformers' own from_pretrained and save_pretrained, for compressed models."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import fips_ext
from fips_ext import Recipe, compress
from fips_ext.errors import CheckpointError
from fips_ext.integrations.quantizer import FipsConfig, FipsQuantizer
from fips_ext.nn.mlp import shared_mlps

from ..tiny_models import CASES, build

pytestmark = pytest.mark.usefixtures("single_thread")


def compressed(name: str, dtype: torch.dtype = torch.float32, **fields) -> tuple[nn.Module, torch.Tensor]:
    model, x = build(name)
    x = x.to(dtype) if x.is_floating_point() else x
    # The stages of Swin are too narrow for a base to pay.
    base = {"base": "identity"} if name == "swin" else {}
    recipe = Recipe(
        **{"ratio": 0.95, "pattern": "bitmap:16x16", "group_size": 2, "steps": 0, **base, **fields},
        calibration_tokens=96,
    )
    compress(model.to(dtype), recipe, [x] * 8)
    return model, x


def first(output) -> torch.Tensor:
    return output[0]


def save(model: nn.Module, folder: Path, by: str) -> None:
    if by == "fips_ext":
        fips_ext.save_pretrained(model, folder)
    else:
        model.save_pretrained(folder, max_shard_size="20KB")


@pytest.mark.parametrize("by", ["fips_ext", "transformers"])
@pytest.mark.parametrize("name", CASES)
def test_every_architecture(name: str, by: str, tmp_path: Path) -> None:
    model, x = compressed(name)
    save(model, tmp_path / "m", by)
    shards = list((tmp_path / "m").glob("*.safetensors"))
    assert (len(shards) > 1) == (by == "transformers")
    theirs = type(model).from_pretrained(tmp_path / "m")
    ours = fips_ext.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        expected = first(model(x))
        assert torch.equal(first(theirs(x)), expected)
        assert torch.equal(first(ours(x)), expected)
    for loaded in (theirs, ours):
        modules = shared_mlps(loaded)
        assert modules.keys() == shared_mlps(model).keys()
        assert len({id(m.base) for m in modules.values()}) == sum(m.owns_base for m in modules.values())


@pytest.mark.parametrize("by", ["fips_ext", "transformers"])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_and_scales_are_exact_in_any_dtype(bits: int, by: str, tmp_path: Path) -> None:
    model, x = compressed("llama", torch.bfloat16, bits=bits, base="identity")
    save(model, tmp_path / "m", by)
    loaded = type(model).from_pretrained(tmp_path / "m")
    assert loaded.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(first(loaded(x)), first(model(x)))
    wider = type(model).from_pretrained(tmp_path / "m", dtype=torch.float32)
    factors = [f for m in shared_mlps(wider).values() for f in m.factors().values()]
    assert wider.dtype == torch.float32
    assert {f.scales.dtype for f in factors} == {torch.float16}
    assert {f.bits for f in factors} == {bits}


def test_what_was_loaded_saves_again(tmp_path: Path) -> None:
    model, x = compressed("llama")
    save(model, tmp_path / "first", "fips_ext")
    for loader in (fips_ext, type(model)):
        again = tmp_path / loader.__name__
        loader.from_pretrained(tmp_path / "first").save_pretrained(again)
        assert not (again / "fips.json").exists()
        loaded = type(model).from_pretrained(again)
        with torch.no_grad():
            assert torch.equal(first(loaded(x)), first(model(x)))


def test_the_config_says_what_the_model_is_when_it_is_saved(tmp_path: Path) -> None:
    model, x = compressed("llama", base="identity")
    for mlp in shared_mlps(model).values():
        for factor in mlp.factors().values():
            factor.round_to(8)
            factor.quantise()
    model.save_pretrained(tmp_path / "m")
    entry = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert {sizes["bits"] for mlp in entry["mlps"] for sizes in mlp["slices"].values()} == {8}
    loaded = type(model).from_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(first(loaded(x)), first(model(x)))


def test_a_loaded_model_trains_and_generates(tmp_path: Path) -> None:
    model, x = compressed("llama")
    save(model, tmp_path / "m", "transformers")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map="cpu")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(x, **options), model.generate(x, **options))
    loaded.train()(input_ids=x, labels=x).loss.backward()
    for mlp in shared_mlps(loaded).values():
        assert float(mlp.up.values.grad.norm()) > 0


_FRESH = """
import sys
{first}
{second}
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp).__name__)
"""


@pytest.mark.parametrize("order", ["before", "after"])
def test_in_a_fresh_process(order: str, tmp_path: Path) -> None:
    """Whichever is imported first; fips_ext alone does not import transformers."""
    model, _ = compressed("llama")
    save(model, tmp_path / "m", "fips_ext")
    ours = "import fips_ext\nassert order == 'after' or 'transformers' not in sys.modules".replace(
        "order", repr(order)
    )
    theirs = "import transformers, transformers.quantizers"
    lines = (ours, theirs) if order == "before" else (theirs, ours)
    script = _FRESH.format(first=lines[0], second=lines[1])
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "m")], capture_output=True, text=True, timeout=120
    )
    assert found.stdout.strip().splitlines()[-1:] == ["SharedMLP"], found.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format_version is 99"),
        ({"mlps": []}, "missing or malformed"),
        ({"mlps": [{}]}, "missing or malformed"),
        ({"absorbed": ["model.nothing"]}, "does not describe this model"),
    ],
)
def test_a_config_that_was_edited(change: dict, message: str, tmp_path: Path) -> None:
    model, _ = compressed("llama")
    save(model, tmp_path / "m", "transformers")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        type(model).from_pretrained(tmp_path / "m")


def test_loading_does_not_compress(tmp_path: Path) -> None:
    model, _ = build("llama")
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"fips_ext\.compress"):
        type(model).from_pretrained(tmp_path / "m", quantization_config=FipsConfig())


# -- the same weights in other classes ----------------------------------------------------------------


@pytest.mark.parametrize("by", ["fips_ext", "transformers"])
@pytest.mark.parametrize("name", ["llama", "bert", "vit", "gpt2"])
def test_the_backbone_of_a_model_with_a_head(name: str, by: str, tmp_path: Path) -> None:
    model, x = compressed(name)
    save(model, tmp_path / "m", by)
    backbone = transformers.AutoModel.from_pretrained(tmp_path / "m")
    assert len(shared_mlps(backbone)) == len(shared_mlps(model))
    with torch.no_grad():
        assert torch.equal(first(backbone(x)), first(model.base_model(x)))


def test_a_backbone_into_a_model_with_a_head(tmp_path: Path) -> None:
    model, x = compressed("bert")
    model.bert.save_pretrained(tmp_path / "m")
    headed = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(first(headed.bert(x)), first(model.bert(x)))


def test_a_part_that_was_compressed_is_saved_with_the_whole(tmp_path: Path) -> None:
    model, x = build("llama")
    recipe = Recipe(ratio=0.95, pattern="bitmap:16x16", steps=0, sensitivity="output", calibration_tokens=96)
    compress(model.model, recipe, [x] * 8)
    model.save_pretrained(tmp_path / "m")
    loaded = type(model).from_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(first(loaded(x)), first(model(x)))


def test_a_wrapper_that_transformers_does_not_know(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone, self.config = backbone, backbone.config

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.backbone(x).logits

    model, x = build("llama")
    recipe = Recipe(ratio=0.95, pattern="bitmap:16x16", steps=0, calibration_tokens=96)
    compress(Wrapper(model), recipe, [x] * 8)
    model.save_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(first(type(model).from_pretrained(tmp_path / "m")(x)), first(model(x)))


# -- a loaded model is like one that was compressed in memory ------------------------------------------


def test_nothing_of_the_quantizer_stays(tmp_path: Path) -> None:
    model, _ = compressed("llama", torch.bfloat16)
    save(model, tmp_path / "m", "transformers")
    loaded = type(model).from_pretrained(tmp_path / "m")
    # What the trainer refuses, and casts and saves that are not allowed, go by these.
    assert not getattr(loaded, "is_quantized", False)
    assert not {"hf_quantizer", "quantization_method"} & loaded.__dict__.keys()
    assert not getattr(loaded.config, "_is_quantized", False)
    assert loaded.float().dtype == torch.float32
    state = {name: 2 * t if t.is_floating_point() else t for name, t in loaded.state_dict().items()}
    loaded.save_pretrained(tmp_path / "other", state_dict=state)
    again = type(model).from_pretrained(tmp_path / "other")
    assert torch.equal(again.model.norm.weight, 2 * loaded.model.norm.weight)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_itself(how, tmp_path: Path) -> None:
    model, x = compressed("llama")
    with torch.no_grad():
        expected = first(model(x))
    copied = how(model)
    del model
    copied.save_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(first(type(copied).from_pretrained(tmp_path / "m")(x)), expected)


@pytest.mark.parametrize("devices", [{"model.layers.0": 0, "model.layers.1": 1}, {"": "disk"}])
def test_layers_over_one_base_stay_on_its_device(devices: dict) -> None:
    config = FipsConfig.of(compressed("llama")[0])
    quantizer = FipsQuantizer(config, pre_quantized=True)
    quantizer.validate_environment(device_map={"": "cpu"})
    with pytest.raises(CheckpointError, match="device_map: got"):
        quantizer.validate_environment(device_map=devices)


# -- registration --------------------------------------------------------------------------------------

_LOOK_FIRST = """
import importlib.util, sys
import fips_ext, transformers
assert importlib.util.find_spec("transformers.quantizers.auto") is not None
import transformers.quantizers.auto as registry
assert "fips" in registry.AUTO_QUANTIZER_MAPPING
"""
_FAILING = """
import sys, types, warnings
import fips_ext, transformers
broken = types.ModuleType("empty")
broken.attach = None
sys.modules["fips_ext.integrations.quantizer"] = broken
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from transformers import AutoModelForCausalLM
    import transformers.quantizers.auto as registry
assert any("cannot load compressed models" in str(w.message) for w in caught), caught
assert "fips" not in registry.AUTO_QUANTIZER_MAPPING
"""


@pytest.mark.parametrize("script", [_LOOK_FIRST, _FAILING], ids=["looked for first", "fails"])
def test_registration(script: str) -> None:
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
