"""forecast: against what compress then does."""

from __future__ import annotations

import itertools

import pytest
import torch

from fips_ext import Recipe, compress
from fips_ext.errors import BudgetError, InvalidArgument
from fips_ext.forecast import forecast
from fips_ext.nn.mlp import shared_mlps
from fips_ext.surgery import find_mlps

from .tiny_models import build

pytestmark = pytest.mark.usefixtures("single_thread")

DATA_FREE = {"init": "svd", "steps": 0, "ranking": "group", "refit": False}


@pytest.mark.parametrize(
    ("base", "pattern"),
    # A dense identity part is larger than the dense model.
    [
        *itertools.product(["shared", "identity", "both"], ["bitmap:16x16", "block:16x16"]),
        ("shared", "dense"),
    ],
)
def test_a_data_free_compression_does_what_was_said(base: str, pattern: str) -> None:
    model, _ = build("llama")
    recipe = Recipe(ratio=0.8, base=base, pattern=pattern, group_size=3, **DATA_FREE)
    dense = {
        (mlp.name, role): linear.weight.detach().clone()
        for mlp in find_mlps(model)
        for role, linear in mlp.linears().items()
    }
    (said,) = forecast(model, recipe)
    report = compress(model, recipe, None)
    assert said.layers == [layer.name for layer in report.layers]
    assert said.base == report.layers[0].base
    assert said.nbytes >= sum(layer.nbytes for layer in report.layers)
    assert said.nbytes / said.dense_bytes == pytest.approx(report.mlp_ratio, rel=0.01)
    assert said.macs_ratio == pytest.approx(report.macs_ratio, rel=0.05)
    errors = [
        float((weight.detach() - dense[name, role]).square().sum() / dense[name, role].square().sum())
        for name, shared in shared_mlps(model).items()
        for role, weight in shared.dense_weights().items()
    ]
    error = sum(errors) / len(errors)
    if pattern == "block:16x16" or base == "both":
        return  # blocks put the neurons in another order; the parts of both overlap
    if base == "identity" or pattern == "dense":
        assert error == pytest.approx(said.weight_error, rel=0.02)
    else:
        assert 0.5 * said.weight_error < error <= said.weight_error  # the base is rotated, too


def test_one_row_for_each_base_that_auto_may_take() -> None:
    model, _ = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = forecast(model, Recipe(ratio=0.8, pattern="bitmap:16x16", group_size=2))
    assert [group.base[0] for group in found] == ["I", "U", "I", "U"]
    assert sum(len(group.layers) for group in found if group.base == "I") == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_less_is_worse() -> None:
    model, _ = build("vit")
    errors = [
        forecast(model, Recipe(ratio=ratio, pattern="bitmap:16x16", base="identity"))[0].weight_error
        for ratio in (0.9, 0.6, 0.3)
    ]
    assert errors == sorted(errors)
    assert 0 < errors[0] < errors[-1] < 1


def test_refuses_what_compress_refuses() -> None:
    model, _ = build("llama")
    with pytest.raises(BudgetError, match="at least"):
        forecast(model, Recipe(ratio=0.01))
    with pytest.raises(InvalidArgument, match="name of no MLP"):
        forecast(model, Recipe(ratio=0.8, include=("nothing",)))
