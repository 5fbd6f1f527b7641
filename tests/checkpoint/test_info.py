"""info: bytes by component, from the headers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from fips_ext.checkpoint import FORMAT_VERSION, info, save_pretrained
from fips_ext.nn.mlp import shared_mlps
from fips_ext.recipe import Recipe

from ..tiny_models import build, share
from .toy import save_toy

pytestmark = pytest.mark.usefixtures("single_thread")


def nbytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@pytest.mark.parametrize("encoding", ["block", "bitmap"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_bytes_add_up_to_the_file(tmp_path: Path, name: str, encoding: str) -> None:
    model, _ = build(name)
    attention = nbytes(
        p
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear) and ".attention." in path.replace("self_attn", "attention")
        for p in m.parameters()
    )
    dense = nbytes(model.parameters())
    share(model, rank=4, per_role=True, encoding=encoding)
    save_pretrained(model, tmp_path / "model")
    described = info(tmp_path / "model")
    sizes = described["bytes"]

    mlps = list(shared_mlps(model).values())
    factors = [factor for mlp in mlps for factor in mlp.factors().values()]
    assert sizes["bases"] == nbytes([mlps[0].base.weight, mlps[0].base_out.weight])
    assert sizes["values"] == nbytes(f.values for f in factors)
    assert sizes["index"] == nbytes(t for f in factors for t in (f.col_ptr, f.row_idx))
    assert sizes["masks"] == nbytes(f.mask for f in factors)
    assert sizes["biases"] == nbytes(b for m in mlps for b in (m.up_bias, m.gate_bias, m.down_bias))
    weights = tmp_path / "model" / "model.safetensors"
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    assert sizes["file"] == weights.stat().st_size == sizes["total"] + header
    parts = ("bases", "values", "scales", "index", "masks", "biases", "other")
    assert sum(sizes[part] for part in parts) == sizes["total"]

    compressed = sizes["total"] - sizes["other"]
    assert described["dense_bytes"]["model"] == dense
    assert described["ratios"]["mlp"] == compressed / described["dense_bytes"]["mlp"]
    assert described["dense_bytes"]["block"] == described["dense_bytes"]["mlp"] + attention
    assert described["ratios"]["model"] == sizes["total"] / dense


def test_what_else_it_says(tmp_path: Path) -> None:
    recipe = Recipe(ratio=0.5)
    save_toy(tmp_path / "toy", recipe=recipe, report={"steps": 3})
    described = info(tmp_path / "toy")
    assert (described["mlps"], described["bases"]) == (3, 2)
    assert described["recipe"] == recipe.to_dict()
    assert described["report"] == {"steps": 3}
    assert described["format_version"] == FORMAT_VERSION
