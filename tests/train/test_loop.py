"""Joint training of a group."""

from __future__ import annotations

import copy

import pytest
import torch

from fips_ext import Recipe, functional, reference
from fips_ext.errors import NumericalError
from fips_ext.surgery import find_mlps
from fips_ext.train import LayerData, train_group
from fips_ext.train.loop import cast_arguments, relative_error

from ..tiny_models import build, observe, shared_from_dense

pytestmark = pytest.mark.usefixtures("single_thread")

RECIPE = Recipe(ratio=0.6, steps=40, tokens_per_step=64)


def group(name: str = "llama", noise: float = 0.1, rank: int = 16):
    """A group whose factors are off by some noise, and its data."""
    dense = find_mlps(build(name)[0])
    shared = [shared_from_dense(dense[0], rank=rank)]
    shared += [shared_from_dense(mlp, owner=shared[0], rank=rank) for mlp in dense[1:]]
    data = []
    for mlp, module in zip(dense, shared, strict=True):
        x = torch.randn(320, mlp.width)
        seen = observe(mlp, x, torch.float32)
        data.append(LayerData(mlp.name, x, seen.targets, seen.weights, seen.power, 64))
        with torch.no_grad():
            for factor in module.factors().values():
                factor.values += noise * torch.randn_like(factor.values)
    return shared, data


@pytest.mark.parametrize("name", ["llama", "vit", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_reduces_the_held_out_error_of_every_layer(name: str, dtype: torch.dtype) -> None:
    shared, data = group(name)
    before, after = train_group(shared, data, RECIPE, dtype)
    assert all(a < 0.7 * b for a, b in zip(after, before, strict=True))
    measured = [relative_error(m, d, dtype) for m, d in zip(shared, data, strict=True)]
    assert measured == after
    assert all(p.dtype == torch.float32 for p in shared[0].parameters())


def test_is_a_pure_function_of_the_seed() -> None:
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(3)
        shared, data = group()
        train_group(shared, data, Recipe(**{**RECIPE.to_dict(), "seed": seed}), torch.float32)
        results.append(torch.cat([p.detach().flatten() for p in shared[1].parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_moves_the_shared_base_and_keeps_it_shared() -> None:
    shared, data = group()
    start = shared[0].base.weight.detach().clone()
    train_group(shared, data, RECIPE, torch.float32)
    assert not torch.equal(shared[0].base.weight, start)
    assert all(m.base is shared[0].base for m in shared)


def test_no_steps_changes_nothing() -> None:
    shared, data = group()
    start = copy.deepcopy(shared[0].state_dict())
    before, after = train_group(shared, data, Recipe(ratio=0.6, steps=0), torch.float32)
    assert before == after
    assert all(torch.equal(v, start[k]) for k, v in shared[0].state_dict().items())


def test_what_got_worse_is_thrown_away() -> None:
    shared, data = group(noise=0.0)
    start = [copy.deepcopy(m.state_dict()) for m in shared]
    recipe = Recipe(**{**RECIPE.to_dict(), "learning_rate": 5.0, "steps": 3})
    before, after = train_group(shared, data, recipe, torch.float32)
    assert before == after
    for module, state in zip(shared, start, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_nan_names_the_layer() -> None:
    shared, data = group()
    data[1].targets[:] = float("nan")
    with pytest.raises(NumericalError, match=data[1].name):
        train_group(shared, data, RECIPE, torch.float32)


def test_relative_error_against_the_oracle() -> None:
    shared, data = group()
    rows = slice(data[0].trained, None)
    arguments = cast_arguments(shared[0], torch.float64)
    y = reference.shared_mlp(data[0].inputs[rows].double(), **arguments).detach()
    target = data[0].targets[rows].double()
    expected = float((y - target).square().sum() / target.square().sum())
    assert relative_error(shared[0], data[0], torch.float32) == pytest.approx(expected, rel=1e-4)


def test_op_and_oracle_give_the_same_gradients() -> None:
    shared, data = group("vit")
    gradients = []
    for module in (functional, reference):
        parameters = list(shared[0].parameters())
        arguments = cast_arguments(shared[0], torch.float32)
        loss = module.reconstruction_loss(data[0].inputs, data[0].targets, scale=1e-2, **arguments)
        gradients.append(torch.autograd.grad(loss, parameters))
    for op, oracle in zip(*gradients, strict=True):
        torch.testing.assert_close(op, oracle, rtol=1e-3, atol=1e-4 * float(oracle.abs().max()))
