"""Large tensors in files: the same results, nothing left behind, and a limit that is kept or says so."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from fips_ext import Recipe, compress, from_pretrained, memory, save_pretrained
from fips_ext._tensor_files import TensorFiles
from fips_ext.errors import CheckpointError, InvalidArgument, MemoryLimit
from fips_ext.init import ScoreCurve, SliceProblem
from fips_ext.init.refit import refit_values
from fips_ext.init.svd import shared_basis, whitened_columns
from fips_ext.integrations.transformers import load_folder, map_folder

from .init.problems import random_metric
from .reliability.bounded import compress as compress_bounded
from .reliability.bounded import save_random_llama
from .test_journal import equal, files_of_at_most
from .tiny_llama import save_text, save_tiny_llama
from .tiny_models import build

pytestmark = pytest.mark.usefixtures("single_thread")

LARGE = 2**16  # float32 elements that are not left in memory


def test_outside_nothing_is_kept() -> None:
    tensor = torch.randn(LARGE)
    assert memory.keep(tensor) is tensor
    memory.relax()
    assert not memory.is_bounded()


@settings(deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    st.lists(st.integers(0, 300), min_size=1, max_size=3),
)
def test_what_is_kept_survives_relaxing(dtype: torch.dtype, shape: list[int]) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    with memory.bounded(tempfile.gettempdir()):
        kept, filled = memory.keep(tensor.clone()), memory.empty(tuple(shape), dtype)
        filled.copy_(tensor)
        memory.relax()
        assert torch.equal(kept, tensor)
        assert torch.equal(filled, tensor)
        assert memory.keep(kept) is kept
        kept.add_(1) if dtype != torch.bool else kept.logical_not_()
        expected = kept.clone()
        memory.relax()
        assert torch.equal(kept, expected)
    assert torch.equal(filled, tensor)  # it stays when the block is over


def test_a_copy_lies_in_a_file(tmp_path) -> None:
    tensor = torch.randn(LARGE)
    copied = memory.copy(tensor)
    assert torch.equal(copied, tensor)
    assert copied.data_ptr() != tensor.data_ptr()
    with memory.bounded(tmp_path):
        copied = memory.copy(tensor)
        assert torch.equal(copied, tensor)
        assert memory.keep(copied) is copied


def test_zeros_of_many_layers_are_not_resident(tmp_path) -> None:
    with memory.bounded(tmp_path):
        before = memory.peak()
        filled = [memory.zeros((2**20,), torch.float32) for _ in range(32)]
        assert memory.peak() < before + 3 * 2**22
        assert not any(bool(tensor.any()) for tensor in filled)


def test_strided_tensors_are_kept_by_their_elements(tmp_path) -> None:
    with memory.bounded(tmp_path):
        tensor = torch.randn(400, 300)
        assert torch.equal(memory.keep(tensor.t()), tensor.t())
        assert torch.equal(memory.keep(tensor[::2]), tensor[::2])


def test_pages_go_and_files_have_no_names(tmp_path) -> None:
    """64 tensors of 4 MiB, one after the other: no more than a few are resident."""
    with memory.bounded(tmp_path):
        before = memory.peak()
        tensors = []
        for i in range(64):
            tensors.append(memory.keep(torch.full((2**20,), float(i))))
            memory.relax()
        assert not list(tmp_path.iterdir())
        assert memory.peak() - before < 64 * 2**20
        assert [int(t[-1]) for t in tensors] == list(range(64))


def test_files_are_closed_with_their_tensors(tmp_path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    with memory.bounded(tmp_path):
        before = open_files()
        tensors = [memory.keep(torch.zeros(2**24)) for _ in range(3)]
        assert open_files() == before + 3
        tensors.clear()
        gc.collect()
        assert open_files() <= before + 1  # the last may be filled up


def test_more_than_the_limit_is_an_error(tmp_path) -> None:
    limit = memory.resident() + 32 * 2**20
    with memory.bounded(tmp_path, limit):
        memory.relax()
        held = torch.ones(2**24)
        with pytest.raises(MemoryLimit, match=r"max_memory: .* GiB were needed at once, .* GiB are allowed"):
            memory.relax()
    assert held.sum() == 2**24


def test_a_full_disk_is_an_error_and_no_crash(tmp_path) -> None:
    with (
        files_of_at_most(2**20),
        memory.bounded(tmp_path),
        pytest.raises(OSError, match=os.strerror(errno.EFBIG)),
    ):
        memory.empty((2**20,), torch.float32)


@pytest.mark.parametrize(
    "fields",
    [{"pattern": "block:16x16", "base": "both", "ratio": 0.95}, {"pattern": "bitmap", "base": "shared"}],
)
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("chunk", [memory.CHUNK, 300])
def test_compression_gives_the_same(tmp_path, monkeypatch, name, fields, chunk) -> None:
    recipe = Recipe(**{"ratio": 0.8, "group_size": 2, "steps": 3, "calibration_tokens": 96, **fields})
    monkeypatch.setattr(memory, "CHUNK", chunk)
    monkeypatch.setattr(memory, "_SMALL", 0)  # everything is in files
    expected, x = build(name)
    found, _ = build(name)
    found.load_state_dict(expected.state_dict())
    compress(expected, recipe, [x] * 8)
    with memory.bounded(tmp_path):
        compress(found, recipe, [x] * 8)
    assert equal(found, expected)


def test_work_in_pieces_is_that_in_one(monkeypatch) -> None:
    slices = [SliceProblem(torch.randn(12, 40), random_metric(12), torch.rand(40) + 0.5) for _ in range(3)]
    base, v = torch.randn(12, 9), torch.randn(9, 40)
    mask = torch.rand(9, 40) < 0.5
    product = base @ v

    def work() -> list[Tensor]:
        vectors, root, _ = shared_basis(slices, 4)
        return [
            torch.tensor([slices[0].error(product), slices[0].energy()], dtype=torch.float64),
            refit_values(slices[0], base, False, v * mask, mask),
            vectors @ vectors.t(),
            torch.cat(whitened_columns(slices, root), 1).double(),
            ScoreCurve.of([v.square(), product.square()]).counts,
        ]

    whole = work()
    for chunk in (1, 100, 500):
        monkeypatch.setattr(memory, "CHUNK", chunk)
        for found, expected in zip(work(), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_distillation_is_refused(tmp_path) -> None:
    model, x = build("llama")
    with memory.bounded(tmp_path), pytest.raises(InvalidArgument, match="distill_steps: trains all layers"):
        compress(model, Recipe(ratio=0.8, distill_steps=2), [x] * 8)


# -- models in their files --------------------------------------------------------------------------


def test_a_mapped_model_is_the_loaded_one(tmp_path) -> None:
    folder = save_tiny_llama(tmp_path / "dense")
    expected = load_folder(folder)
    with memory.bounded(tmp_path):
        for dtype in (None, torch.bfloat16):
            found = map_folder(folder, dtype)
            assert equal(found, expected.to(dtype or torch.float32))
            memory.relax()
            assert equal(found, expected)
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_a_mapped_model_is_not_written_to(tmp_path) -> None:
    folder = save_tiny_llama(tmp_path / "dense")
    before = (folder / "model.safetensors").read_bytes()
    with memory.bounded(tmp_path):
        found = map_folder(folder)
        found.model.norm.weight.data.fill_(3)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("problem", ["gone", "renamed", "other shape", "no config", "compressed"])
def test_folders_that_cannot_be_mapped(tmp_path, problem) -> None:
    folder = save_tiny_llama(tmp_path / "dense")
    tensors = {name: tensor.clone() for name, tensor in TensorFiles(folder).read()}
    name = "model.layers.0.mlp.up_proj.weight"
    if problem == "gone":
        del tensors[name]
    elif problem == "renamed":
        tensors = {f"transformer.{key}": tensor for key, tensor in tensors.items()}
    elif problem == "other shape":
        tensors[name] = tensors[name][:5].clone()
    elif problem == "no config":
        (folder / "config.json").unlink()
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "quantization_config": {"quant_method": "fips"}})
        )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    messages = {
        "gone": f"holds no {name} of LlamaForCausalLM, or under another name",
        "renamed": "holds no .* of LlamaForCausalLM, or under another name",
        "other shape": "does not fit its config.json",
        "no config": "has no config.json",
        "compressed": "is quantised or compressed already",
    }
    with memory.bounded(tmp_path), pytest.raises(CheckpointError, match=messages[problem]):
        map_folder(folder)


# -- shards -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compressed() -> nn.Module:
    model, x = build("llama")
    compress(model, Recipe(ratio=0.8, group_size=2, steps=0, calibration_tokens=96), [x] * 8)
    return model


def test_a_checkpoint_in_shards_is_the_same(tmp_path, compressed) -> None:
    from transformers import AutoModelForCausalLM

    save_pretrained(compressed, tmp_path / "whole")
    save_pretrained(compressed, tmp_path / "parts", shard_bytes=8192)
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    expected = from_pretrained(tmp_path / "whole")
    assert equal(from_pretrained(tmp_path / "parts"), expected)
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "parts"), expected)
    sizes = [TensorFiles(tmp_path / name).sizes() for name in ("whole", "parts")]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, _i: f.unlink(), "is missing; copy the whole folder again"),
        (lambda f, _i: f.write_bytes(f.read_bytes()[:100]), "truncated or damaged"),
        (lambda _f, i: i.write_text("{}"), "truncated or damaged"),
        (lambda _f, i: i.write_text('{"weight_map": []}'), "truncated or damaged"),
        (lambda _f, i: i.write_text('{"weight_map": {"a": 5}}'), "5 is not the name of a .safetensors file"),
        (lambda f, i: _moved(i, f"../{f.name}"), "is not the name of a .safetensors file beside it"),
        (lambda f, i: _moved(i, str(f)), "is not the name of a .safetensors file beside it"),
        (lambda _f, i: _moved(i, "fips.json"), "is not the name of a .safetensors file beside it"),
        (lambda f, i: _dropped(i, f.name), "where the index does not have it"),
        (lambda _f, i: _added(i), "no.such.tensor is not in model-"),
    ],
)
def test_damaged_shards(tmp_path, compressed, change, message) -> None:
    save_pretrained(compressed, tmp_path / "parts", shard_bytes=8192)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())["weight_map"]
    several = Counter(index.values()).most_common(1)[0][0]
    file = tmp_path / "parts" / several
    shutil.copy(file, tmp_path)  # what a path out of the folder would find
    change(file, tmp_path / "parts" / "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path / "parts")


def _edited(index: Path, change) -> None:
    document = json.loads(index.read_text())
    change(document["weight_map"])
    index.write_text(json.dumps(document))


def _moved(index: Path, place: str) -> None:
    _edited(index, lambda places: places.update({min(places): place}))


def _dropped(index: Path, file: str) -> None:
    """One of several tensors of ``file``, so that it is still opened."""
    _edited(index, lambda places: places.pop(max(name for name in places if places[name] == file)))


def _added(index: Path) -> None:
    _edited(index, lambda places: places.update({"no.such.tensor": min(places.values())}))


# -- the command ------------------------------------------------------------------------------------


def test_the_command_keeps_to_a_limit(tmp_path) -> None:
    """`make reliability` takes models above the limit."""
    save_random_llama(tmp_path / "model", 512, 2048, 8)
    options = "--ratio 0.5 --steps 2 --tokens 1024 --group-size 1 --base identity --pattern block:32x32"
    text = save_text(tmp_path / "text.txt")
    found = compress_bounded(tmp_path / "model", tmp_path / "out", text, "0.6GiB", *options.split())
    assert 0.1 * 2**30 < found["peak"] < 0.6 * 2**30
    assert from_pretrained(tmp_path / "out").model.layers[0].mlp.base.identity
