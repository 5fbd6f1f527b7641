"""What the page is told about a checkpoint, against the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fips_ext import Recipe, compress, info, save_pretrained
from fips_ext.layout import to_blocks
from fips_ext.nn.mlp import shared_mlps
from fips_ext.report_page import collect
from fips_ext.report_page.latency import measure

from ..tiny_models import build, share

pytestmark = pytest.mark.usefixtures("single_thread")


def saved(folder: Path, **fields):
    model, x = build("llama")
    recipe = Recipe(
        **{"ratio": 0.8, "pattern": "bitmap:16x32", "group_size": 2, "steps": 2, "base": "shared", **fields},
        calibration_tokens=96,
    )
    report = compress(model, recipe, [x] * 8)
    save_pretrained(model, folder, recipe=recipe, report=report)
    return model, report


@pytest.mark.parametrize(
    "fields",
    [{}, {"base": "identity"}, {"base": "both"}, {"pattern": "block:16x32"}, {"bits": 4, "base": "identity"}],
    ids=["shared", "identity", "both", "block", "codes"],
)
def test_layers_and_groups(fields: dict, tmp_path: Path) -> None:
    model, report = saved(tmp_path / "m", **fields)
    facts = collect(tmp_path / "m", model)
    assert facts.title == "m"
    assert facts.info == info(tmp_path / "m")
    assert [layer.group for layer in facts.layers] == [0, 1, 1]
    for layer, said, mlp in zip(facts.layers, report.layers, shared_mlps(model).values(), strict=True):
        assert (layer.name, layer.nbytes, layer.error_after) == (said.name, said.nbytes, said.error_after)
        for role, factor in mlp.factors().items():
            # Of the dense V: which slots of each block hold a value.
            stored = (factor.to_dense() != 0).float()
            expected = to_blocks(stored, factor.block).mean((-2, -1)).t()
            found = torch.tensor(layer.fill[role])
            if fields.get("pattern", "").startswith("block"):
                assert torch.equal(found > 0, expected > 0)
            elif "bits" not in fields:
                torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)
            assert layer.density[role] == pytest.approx(factor.slice().density)
    for group, layers in zip(facts.groups, ([0], [1, 2]), strict=True):
        mlp = list(shared_mlps(model).values())[layers[0]]
        assert (group.rank, group.identity) == (mlp.base.rank, mlp.base.identity)
        assert len(group.spectrum) == min(mlp.base.rank, mlp.width)
        assert group.spectrum == sorted(group.spectrum, reverse=True)
        assert len(group.usage) == len(layers)


def test_a_checkpoint_without_report(tmp_path: Path) -> None:
    model, _ = build("vit")
    share(model, rank=4)
    save_pretrained(model, tmp_path / "m")
    layer = collect(tmp_path / "m", model).layers[0]
    assert (layer.nbytes, layer.error_before) == (None, None)
    assert layer.fill.keys() == {"up", "down"}


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_latency(name: str) -> None:
    model, _ = build(name)
    share(model, rank=4)
    found = measure(next(iter(shared_mlps(model).values())))
    assert [point.tokens for point in found][:3] == [1, 2, 4]
    assert all(0 < point.dense < 1e3 and 0 < point.compressed < 1e3 for point in found)
