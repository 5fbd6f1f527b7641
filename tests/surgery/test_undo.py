"""to_dense: the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fips_ext import Recipe, compress, from_pretrained, save_pretrained, to_dense
from fips_ext.errors import InvalidArgument, SurgeryError

from ..tiny_models import CASES, GatedMLP, PlainMLP, Stack, build, share

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.mark.parametrize("name", CASES)
def test_computes_the_same(name: str) -> None:
    model, x = build(name)
    names = set(model.state_dict())
    share(model, rank=4, encoding="bitmap")
    dense = to_dense(model)
    assert set(dense.state_dict()) == names
    assert not any(p.is_meta for p in dense.parameters())
    with torch.no_grad():
        torch.testing.assert_close(dense(x)[0], model(x)[0], rtol=1e-3, atol=1e-4)


def test_keeps_dtype_and_mode() -> None:
    model, _ = build("llama")
    share(model.to(torch.bfloat16))
    dense = to_dense(model.train())
    assert dense.training
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}


def test_any_other_model_is_filled() -> None:
    model = Stack(PlainMLP(), GatedMLP()).eval()
    share(model)
    x = torch.randn(2, 5, 32)
    with pytest.raises(InvalidArgument, match="into="):
        to_dense(model)
    dense = to_dense(model, into=Stack(PlainMLP(), GatedMLP()))
    torch.testing.assert_close(dense(x), model(x), rtol=1e-4, atol=1e-5)


def test_one_mlp_in_two_places() -> None:
    def stack() -> Stack:
        mlp = PlainMLP()
        return Stack(mlp, GatedMLP(), mlp)

    model = stack().eval()
    share(model)
    x = torch.randn(2, 5, 32)
    dense = to_dense(model, into=stack())
    assert dense.blocks[0].mlp is dense.blocks[2].mlp
    torch.testing.assert_close(dense(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        lambda: Stack(PlainMLP(), PlainMLP()),
        lambda: Stack(PlainMLP(hidden=48), GatedMLP()),
        lambda: Stack(PlainMLP(bias=False), GatedMLP()),
        lambda: Stack(PlainMLP()),
        lambda: Stack(PlainMLP(), GatedMLP(), PlainMLP()),
    ],
)
def test_another_architecture_is_refused(other) -> None:
    model = Stack(PlainMLP(), GatedMLP())
    share(model)
    with pytest.raises(SurgeryError, match="into: "):
        to_dense(model, into=other())


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="dense already"):
        to_dense(build("llama")[0])


def test_what_was_not_compressed_is_copied() -> None:
    model, x = build("llama")
    recipe = Recipe(ratio=0.95, pattern="bitmap:16x16", steps=0, calibration_tokens=96, exclude=("*.1.mlp",))
    compress(model, recipe, [x] * 8)
    dense = to_dense(model)
    assert torch.equal(dense.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    with torch.no_grad():
        torch.testing.assert_close(dense(x)[0], model(x)[0], rtol=1e-3, atol=1e-4)


def test_tensors_keep_their_own_dtypes(tmp_path: Path) -> None:
    """A model that transformers loaded in half precision still has rotary frequencies in float32."""
    model, _ = build("llama")
    share(model.to(torch.bfloat16))
    save_pretrained(model, tmp_path / "m")
    model = from_pretrained(tmp_path / "m")
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.float() * 1.0001
    model.model.norm.float()
    model.generation_config.max_length = 77
    dense = to_dense(model)
    assert torch.equal(dense.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert dense.model.norm.weight.dtype == torch.float32
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    assert dense.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert dense.generation_config.max_length == 77
