"""transformers' own from_pretrained and save_pretrained, for compressed models."""

from __future__ import annotations

import json
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
    model, _ = compressed("llama", base="identity")
    for mlp in shared_mlps(model).values():
        for factor in mlp.factors().values():
            factor.round_to(8)
            factor.quantise()
    model.save_pretrained(tmp_path / "m")
    entry = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert {sizes["bits"] for mlp in entry["mlps"] for sizes in mlp["slices"].values()} == {8}
    assert type(model).from_pretrained(tmp_path / "m") is not None


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
        ({"mlps": [{}]}, "does not describe this model"),
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
    from fips_ext.integrations.quantizer import FipsConfig

    with pytest.raises(CheckpointError, match=r"fips_ext\.compress"):
        type(model).from_pretrained(tmp_path / "m", quantization_config=FipsConfig())
