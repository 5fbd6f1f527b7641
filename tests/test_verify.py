"""verify: what it measures, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import fips_ext
from fips_ext import functional, verify
from fips_ext.errors import InvalidArgument, NumericalError
from fips_ext.nn.mlp import shared_mlps

from .tiny_models import GatedMLP, PlainMLP, Stack, build, share

pytestmark = pytest.mark.usefixtures("single_thread")


def compressed(dtype: torch.dtype = torch.float32, encoding: str = "bitmap") -> torch.nn.Module:
    model = Stack(PlainMLP(), GatedMLP()).to(dtype)
    share(model, rank=8, encoding=encoding)
    return model


@pytest.mark.parametrize("encoding", ["bitmap", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_sound_model(dtype: torch.dtype, encoding: str) -> None:
    model = compressed(dtype, encoding)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    errors = verify(model)
    assert errors.keys() == shared_mlps(model).keys()
    assert 0 < max(errors.values()) < (1e-5 if dtype == torch.float32 else 3e-2)
    assert verify(model) == errors
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("bits", [8, 4])
def test_codes(bits: int) -> None:
    model = compressed(torch.bfloat16)
    for mlp in shared_mlps(model).values():
        for factor in mlp.factors().values():
            factor.round_to(bits)
            factor.quantise()
    assert max(verify(model).values()) < 3e-2


def test_a_model_of_transformers() -> None:
    model, _ = build("llama")
    share(model, rank=4)
    assert len(verify(model)) == 3


@pytest.mark.parametrize("where", ["values", "base", "bias"])
def test_nan_names_layer_and_tensor(where: str) -> None:
    model = compressed()
    mlp = next(iter(shared_mlps(model).values()))
    tensor = {"values": mlp.down.values, "base": mlp.base.weight, "bias": mlp.down_bias}[where]
    with torch.no_grad():
        tensor.view(-1)[0] = float("nan")
    with pytest.raises(NumericalError, match=rf"blocks\.0\.mlp: .*{where}.* holds NaN"):
        verify(model)


def test_a_damaged_index() -> None:
    model = compressed()
    mlp = shared_mlps(model)["blocks.1.mlp"]
    mlp.up.row_idx[0] = 99
    with pytest.raises(InvalidArgument, match=r"blocks\.1\.mlp\.up: .*row_idx"):
        verify(model)


def test_an_index_that_does_not_follow() -> None:
    model = compressed()
    factor = shared_mlps(model)["blocks.1.mlp"].up
    factor.col_idx = factor.col_idx.flip(0)
    stale = factor.col_idx.clone()
    with pytest.raises(InvalidArgument, match=r"blocks\.1\.mlp\.up: col_idx does not follow"):
        verify(model)
    assert torch.equal(factor.col_idx, stale)


def test_a_kernel_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.shared_mlp
    monkeypatch.setattr(functional, "shared_mlp", lambda x, **options: right(x, **options) * 1.01)
    with pytest.raises(NumericalError, match=r"blocks\.0\.mlp: 1 tokens .* off the oracle"):
        verify(compressed())


def test_a_dense_model() -> None:
    with pytest.raises(InvalidArgument, match="has no SharedMLP"):
        fips_ext.verify(Stack(PlainMLP()))
