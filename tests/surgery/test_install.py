"""DenseMLP.install: the model computes the same with a SharedMLP in place."""

from __future__ import annotations

import pytest
import torch

from fips_ext.errors import SurgeryError
from fips_ext.nn import SharedMLP
from fips_ext.nn.mlp import shared_mlps
from fips_ext.surgery import AbsorbedLinear, find_mlps

from ..tiny_models import CASES, GatedMLP, PlainMLP, Stack, build, share, shared_from_dense

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.mark.parametrize("encoding", ["block", "bitmap"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_the_dense_model(name: str, encoding: str) -> None:
    model, inputs = build(name)
    with torch.no_grad():
        dense = model(inputs)[0]
        share(model, encoding=encoding)
        shared = model(inputs)[0]
    assert len(shared_mlps(model)) == CASES[name].count
    torch.testing.assert_close(shared, dense, rtol=1e-4, atol=1e-5)


def test_outputs_equal_with_a_base_per_role() -> None:
    model, inputs = build("bert")
    with torch.no_grad():
        dense = model(inputs)[0]
        share(model, rank=8, per_role=True)
        torch.testing.assert_close(model(inputs)[0], dense, rtol=1e-4, atol=1e-5)


def test_the_split_form_leaves_an_absorbed_linear() -> None:
    model, _ = build("bert")
    share(model)
    layer = model.bert.encoder.layer[0]
    assert isinstance(layer.intermediate, SharedMLP)
    assert isinstance(layer.output.dense, AbsorbedLinear)


def test_one_mlp_in_two_places_is_replaced_in_both() -> None:
    repeated = PlainMLP()
    model = Stack(repeated, PlainMLP(), repeated)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        dense = model(x)
        share(model)
        torch.testing.assert_close(model(x), dense, rtol=1e-4, atol=1e-5)
    assert model.blocks[0].mlp is model.blocks[2].mlp


def test_the_training_mode_stays() -> None:
    model = Stack(PlainMLP())
    for training in (True, False):
        dense = find_mlps(Stack(PlainMLP()).train(training))[0]
        dense.install(shared_from_dense(dense))
        assert dense.slots[0].module.training is training
    assert model.training


def test_an_mlp_of_another_shape_is_refused() -> None:
    dense = find_mlps(Stack(PlainMLP()))[0]
    for other in (PlainMLP(hidden=96), PlainMLP(act=torch.nn.ReLU()), GatedMLP()):
        mlp = shared_from_dense(find_mlps(Stack(other))[0])
        with pytest.raises(SurgeryError, match=r"blocks\.0\.mlp needs \(32, 64, False, 'gelu'\)"):
            dense.install(mlp)


def test_a_second_install_is_refused() -> None:
    dense = find_mlps(Stack(PlainMLP()))[0]
    mlp = shared_from_dense(dense)
    dense.install(mlp)
    with pytest.raises(SurgeryError, match="replaced already"):
        dense.install(mlp)


def test_a_compressed_model_has_nothing_to_find() -> None:
    model = Stack(PlainMLP())
    share(model)
    with pytest.raises(SurgeryError, match="compressed already"):
        find_mlps(model)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_trial_leaves_no_trace(name: str) -> None:
    """Not even after an error; and the MLP can be installed afterwards."""
    model, _ = build(name)
    before = dict(model.named_modules())
    dense = find_mlps(model)[1]
    shared = shared_from_dense(dense)

    def fail() -> None:
        with dense.trial(shared):
            assert shared in shared_mlps(model).values()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert dict(model.named_modules()) == before
    dense.install(shared)
    with dense.original():
        assert dict(model.named_modules()) == before
    assert shared in shared_mlps(model).values()
