"""Damaged, foreign and newer checkpoints: a CheckpointError that says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fips_ext.checkpoint import FORMAT_VERSION, from_pretrained, info, save_pretrained
from fips_ext.errors import CheckpointError, InvalidArgument

from ..tiny_models import PlainMLP, Stack, build, share
from .toy import load_toy, save_toy

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_toy(tmp_path / "toy")
    return tmp_path / "toy"


def edit_json(folder: Path, change: Callable[[dict], object], name: str = "fips.json") -> None:
    document = json.loads((folder / name).read_text())
    change(document)
    (folder / name).write_text(json.dumps(document))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_no_directory(tmp_path: Path) -> None:
    for read in (load_toy, info):
        with pytest.raises(CheckpointError, match="does not exist"):
            read(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["fips.json", "model.safetensors"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    for read in (load_toy, info):
        with pytest.raises(CheckpointError, match=f"has no {name}"):
            read(folder)


def test_no_config_and_no_model(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json.*Stack.*model="):
        from_pretrained(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    for read in (load_toy, info):
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            read(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"recipe": {}}', "\xff"])
def test_a_structure_that_is_not_ours(folder: Path, text: str) -> None:
    (folder / "fips.json").write_bytes(text.encode("latin-1"))
    for read in (load_toy, info):
        with pytest.raises(CheckpointError, match="is not the JSON that save_pretrained writes"):
            read(folder)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1", None])
def test_another_format_version(folder: Path, version: object) -> None:
    edit_json(folder, lambda d: d.update(format_version=version))
    for read in (load_toy, info):
        with pytest.raises(CheckpointError, match="upgrade fips_ext"):
            read(folder)


@pytest.mark.parametrize("section", ["mlps", "absorbed", "tied", "buffer_dtypes", "block_linear_bytes"])
def test_a_section_of_another_kind(folder: Path, section: str) -> None:
    edit_json(folder, lambda d: d.update({section: "text"}))
    with pytest.raises(CheckpointError, match=f"'{section}'.*missing or malformed"):
        load_toy(folder)


def test_a_structure_without_mlps(folder: Path) -> None:
    edit_json(folder, lambda d: d.update(mlps=[]))
    for read in (load_toy, info):
        with pytest.raises(CheckpointError, match=r"'mlps'.*missing or malformed"):
            read(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda mlp: mlp["slices"]["up"].update(num_values=7),
        lambda mlp: mlp["slices"]["up"].update(num_blocks=1),
        lambda mlp: mlp["slices"]["up"].update(cols=128),
        lambda mlp: mlp["slices"]["up"].update(rows=8),
        lambda mlp: mlp["slices"]["up"].update(block=[16, 16]),
        lambda mlp: mlp["slices"]["up"].update(block=[3, 5]),
        lambda mlp: mlp["slices"]["up"].update(encoding="block"),
        lambda mlp: mlp["slices"]["up"].update(rows=-1),
        lambda mlp: mlp["slices"].pop("down"),
        lambda mlp: mlp.update(rank=9),
        lambda mlp: mlp.update(rank_out=None),
        lambda mlp: mlp.update(width="wide"),
        lambda mlp: mlp.update(hidden=32),
        lambda mlp: mlp.update(identity=False),
        lambda mlp: mlp.update(activation="tanh"),
        lambda mlp: mlp.update(biases=[]),
        lambda mlp: mlp.update(biases=["up", "gate", "down"]),
        lambda mlp: mlp.update(paths=["blocks.9.mlp"], base_owner="blocks.9.mlp"),
        lambda mlp: mlp.update(base_owner="blocks.1.mlp"),
        lambda mlp: mlp.update(paths=[]),
        lambda mlp: mlp.pop("slices"),
    ],
)
def test_sizes_that_disagree(folder: Path, change: Callable[[dict], object]) -> None:
    edit_json(folder, lambda d: change(d["mlps"][0]))
    with pytest.raises(CheckpointError, match=r"fips\.json"):
        load_toy(folder)


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("absorbed", ["blocks.7.output"]),
        ("tied", {"nobody": "blocks.0.norm.weight"}),
        ("buffer_dtypes", {"blocks.0.mlp.up.row_ptr": "load"}),
    ],
)
def test_names_that_disagree(folder: Path, section: str, value: object) -> None:
    edit_json(folder, lambda d: d.update({section: value}))
    with pytest.raises(CheckpointError, match=r"fips\.json"):
        load_toy(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("blocks.1.mix.weight"), r"missing blocks\.1\.mix\.weight, unexpected nothing"),
        (lambda t: t.update(more=torch.zeros(1)), "missing nothing, unexpected more"),
        (lambda t: t["blocks.0.mlp.up.row_idx"].fill_(99), r"row_idx: entries must lie in \[0, "),
        (lambda t: t["blocks.0.mlp.up.row_idx"].fill_(-1), r"row_idx: entries must lie in \[0, "),
        (lambda t: t["blocks.0.mlp.up.row_idx"].zero_(), "row_idx: must increase strictly"),
        (lambda t: t["blocks.0.mlp.down.col_ptr"].zero_(), "col_ptr: must rise from 0"),
        (lambda t: t["blocks.1.mlp.gate.mask"].zero_(), "values: expected shape"),
        (
            lambda t: t.update({"blocks.0.mlp.up.values": t["blocks.0.mlp.up.values"].int()}),
            r"blocks\.0\.mlp\.up\.values is I32",
        ),
        (
            lambda t: t.update({"blocks.0.mlp.up.col_ptr": t["blocks.0.mlp.up.col_ptr"].long()}),
            r"blocks\.0\.mlp\.up\.col_ptr is I64",
        ),
    ],
)
def test_tensors_that_disagree(folder: Path, change: Callable, reason: str) -> None:
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=reason):
        load_toy(folder)


def test_the_weights_of_another_save(folder: Path, tmp_path: Path) -> None:
    model = Stack(PlainMLP())
    share(model)
    save_pretrained(model, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(folder / "model.safetensors")
    for read in (load_toy, info):
        with pytest.raises(CheckpointError):
            read(folder)


def test_a_dtype_that_is_none(folder: Path) -> None:
    with pytest.raises(InvalidArgument, match="expected a floating dtype"):
        load_toy(folder, dtype=torch.int8)


def test_a_buffer_that_nothing_fills(folder: Path) -> None:
    with torch.device("meta"):
        skeleton = Stack(PlainMLP(), PlainMLP(), PlainMLP())
    skeleton.register_buffer("positions", torch.arange(4, device="meta"), persistent=False)
    with pytest.raises(CheckpointError, match="positions are on the meta device"):
        from_pretrained(folder, model=skeleton)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    model, _ = build("llama")
    share(model)
    save_pretrained(model, folder)
    return folder


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.update(architectures=["NoSuchModel"]), "NoSuchModel"),
        (lambda c: c.update(architectures=None), "architectures is"),
        (lambda c: c.update(model_type="no-such-type"), "cannot read it"),
        (lambda c: c.update(num_hidden_layers=2), "does not describe this model"),
        (lambda c: c.update(num_hidden_layers=4), "does not fit the model: missing"),
        (lambda c: c.update(vocab_size=65), r"embed_tokens\.weight is F32 \[64, 32\]"),
    ],
)
def test_a_config_that_disagrees(llama: Path, tmp_path: Path, change: Callable, reason: str) -> None:
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    edit_json(tmp_path, change, "config.json")
    with pytest.raises(CheckpointError, match=reason):
        from_pretrained(tmp_path)


def test_a_config_that_is_not_json(llama: Path, tmp_path: Path) -> None:
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        from_pretrained(tmp_path)
