"""Dense folders of transformers: the class they name, and loud failure on missing weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaForCausalLM

from fips_ext.errors import CheckpointError
from fips_ext.integrations.transformers import empty_model, load_folder, model_class

from ..tiny_models import build

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, _ = build("llama")
    model.save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_comes_back_as_its_class(folder: Path) -> None:
    torch.manual_seed(0)
    dense, ids = build("llama")
    model = load_folder(folder)
    assert type(model) is LlamaForCausalLM
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(ids)[0], dense(ids)[0])


def test_dtype_casts(folder: Path) -> None:
    assert load_folder(folder, torch.bfloat16).dtype == torch.bfloat16


def test_weights_left_random_are_an_error(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing_keys.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_folder(folder)


def test_a_damaged_folder(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        load_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="transformers cannot read"):
        load_folder(folder)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_folder(tmp_path)


def test_an_architecture_transformers_does_not_have(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(CheckpointError, match="NoSuchModel"):
        load_folder(folder)
    with pytest.raises(CheckpointError, match=r"architectures is \[\]"):
        model_class(BertConfig())


def test_an_empty_model_has_buffers_and_no_weights() -> None:
    config = build("llama")[0].config
    config.architectures = ["LlamaForCausalLM"]
    model = empty_model(config)
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
