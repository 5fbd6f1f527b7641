"""The demo on a tiny model: every number it reports, and the fresh process."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
from types import ModuleType

import pytest
from rich.console import Console

from fips_ext import checkpoint
from fips_ext.errors import CheckpointError
from fips_ext.integrations import demo
from fips_ext.integrations.text import WikipediaText
from fips_ext.models import load_model
from fips_ext.recipe import Recipe
from fips_ext.throughput import Workload, generate_text

from ..tiny_llama import byte_tokenizer, save_text, tiny_llama
from ..tiny_models import share


@pytest.fixture
def tiny_demo(monkeypatch, tmp_path):
    """The demo with a tiny model, a short text and a compression that merely shares."""
    module = ModuleType("fips_ext._compress")

    def compress(model, recipe, data, progress=None):
        share(model)
        return {"recipe": recipe.to_dict()}

    module.compress = compress
    monkeypatch.setitem(sys.modules, "fips_ext._compress", module)
    text = save_text(tmp_path / "text.txt").read_text()
    monkeypatch.setattr(demo, "wikipedia", lambda: WikipediaText(text, text))
    monkeypatch.setattr(demo, "CONTEXT", 64)
    monkeypatch.setattr(demo, "QUICK_WINDOWS", 4)
    monkeypatch.setattr(demo, "_WORKLOAD", Workload(prompt_tokens=4, new_tokens=2, repeats=1))

    def load(spec, dtype=None):
        return (tiny_llama().to(dtype), byte_tokenizer()) if spec == demo.DEMO else load_model(spec, dtype)

    monkeypatch.setattr(demo, "load_model", load)


@contextlib.contextmanager
def no_bar(_description):
    yield lambda done, total: None


def test_summary(tiny_demo, tmp_path):
    out, notes = tmp_path / "out", []
    summary = demo.run_demo(out, Recipe(ratio=0.65), note=notes.append, progress_bar=no_bar)
    written = json.loads((out / "summary.json").read_text())
    assert written == json.loads(json.dumps(dataclasses.asdict(summary)))
    facts = checkpoint.info(out)
    assert summary.mlp_ratio == pytest.approx(summary.mlp_bytes_compressed / summary.mlp_bytes_dense)
    assert summary.mlp_bytes_dense == 4 * 3 * 64 * 128 * 2  # blocks, matrices, d, n, bytes of bfloat16
    attention = 4 * 2 * (64 * 64 + 32 * 64) * 2
    assert summary.linear_bytes_dense == summary.mlp_bytes_dense + attention
    assert summary.linear_bytes_compressed == summary.mlp_bytes_compressed + attention
    assert summary.file_bytes_compressed == facts["bytes"]["file"]
    assert summary.ppl_ratio == pytest.approx(1, rel=0.02)
    assert summary.ppl_tokens == 4 * 63
    assert notes
    model, tokenizer = load_model(out)
    assert summary.continuation == generate_text(model, tokenizer, demo.PROMPT, 40)
    console = Console(width=120, file=io.StringIO())
    console.print(demo.summary_table(summary))
    assert f"{summary.ppl_compressed:.2f}" in console.file.getvalue()


def test_dense_file_counts_tied_tensors_once(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    file = (tmp_path / "model.safetensors").stat().st_size
    assert 0 < file - demo.safetensors_bytes(model) < 8192  # the header


def test_a_fresh_process_that_fails_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="a fresh process could not generate from it"):
        demo.generate_in_fresh_process(tmp_path, "abc", 2)
