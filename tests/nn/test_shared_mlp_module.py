"""SharedMLP: one base for a group, through state_dict, copies, casts and training."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fips_ext import reference
from fips_ext.errors import InvalidArgument
from fips_ext.layout import BlockSparse
from fips_ext.nn import SharedBase, SharedMLP, SparseFactor
from fips_ext.nn.mlp import shared_mlps
from fips_ext.surgery import find_mlps

from ..tiny_models import HIDDEN, WIDTH, GatedMLP, PlainMLP, Stack, share

pytestmark = pytest.mark.usefixtures("single_thread")

RANK = 8


def group(per_role: bool = False) -> nn.Module:
    """Three layers over the base of the first, one gated."""
    model = Stack(PlainMLP(), GatedMLP(), PlainMLP())
    share(model, rank=RANK, per_role=per_role, encoding="bitmap")
    return model


def factor(rows: int, cols: int = HIDDEN) -> SparseFactor:
    return SparseFactor(BlockSparse.from_dense(torch.randn(rows, cols), (16, 16)))


def assert_tied(model: nn.Module) -> None:
    first, *others = shared_mlps(model).values()
    assert first.owns_base
    assert all(mlp.base is first.base and mlp.base_out is first.base_out for mlp in others)


# -- one base ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_role", [False, True])
def test_the_state_holds_the_bases_once(per_role: bool) -> None:
    model = group(per_role)
    bases = [name for name in model.state_dict() if ".base" in name]
    assert bases == [f"blocks.0.mlp.{name}.weight" for name in ("base", "base_out")[: 1 + per_role]]


@pytest.mark.parametrize("per_role", [False, True])
def test_the_parameters_are_counted_once(per_role: bool) -> None:
    model = group(per_role)
    mlps = list(shared_mlps(model).values())
    values = sum(f.values.numel() for mlp in mlps for f in mlp.factors().values())
    biases = 2 * (HIDDEN + WIDTH)
    bases = (1 + per_role) * WIDTH * RANK
    assert sum(p.numel() for mlp in mlps for p in mlp.parameters()) == bases + values + biases


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("per_role", [False, True])
def test_a_copy_keeps_the_tie_and_stands_alone(how: str, per_role: bool) -> None:
    model = group(per_role).eval()
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        before = model(x)
        copied = COPIES[how](model)
        assert_tied(copied)
        assert torch.equal(copied(x), before)
        copied.blocks[0].mlp.base.weight.zero_()
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_cast_reaches_every_layer(dtype: torch.dtype) -> None:
    model = group().to(dtype)
    assert_tied(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {mlp.base.weight.dtype for mlp in shared_mlps(model).values()} == {dtype}
    assert model(torch.randn(2, 5, WIDTH, dtype=dtype)).dtype == dtype


def test_loading_a_state_reaches_every_layer() -> None:
    model = group()
    target = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    target.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        assert torch.equal(target(x), model(x))
    assert_tied(target)


def test_the_gradient_of_a_base_sums_over_its_layers() -> None:
    model = Stack(PlainMLP(), PlainMLP())
    share(model, rank=RANK)
    x = torch.randn(7, WIDTH)
    first, second = shared_mlps(model).values()
    gradients = []
    for outputs in ([first], [second], [first, second]):
        model.zero_grad()
        sum(mlp(x).square().sum() for mlp in outputs).backward()
        gradients.append(first.base.weight.grad.clone())
    torch.testing.assert_close(gradients[0] + gradients[1], gradients[2])


# -- one layer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PlainMLP, GatedMLP])
@pytest.mark.parametrize("per_role", [False, True])
def test_dense_weights_are_those_it_was_made_of(kind: type, per_role: bool) -> None:
    model = Stack(kind())
    dense = find_mlps(model)[0]
    share(model, rank=RANK, per_role=per_role)
    weights = model.blocks[0].mlp.dense_weights()
    assert list(weights) == list(dense.linears())
    for role, linear in dense.linears().items():
        torch.testing.assert_close(weights[role], linear.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [PlainMLP, GatedMLP])
def test_forward_is_the_reference(kind: type) -> None:
    model = Stack(kind())
    share(model, rank=RANK, per_role=True)
    mlp = model.blocks[0].mlp
    x = torch.randn(3, 4, WIDTH)
    expected = reference.shared_mlp(x, **mlp.op_arguments())
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-5)


def test_sizes() -> None:
    mlp = group().blocks[1].mlp
    assert (mlp.width, mlp.hidden) == (WIDTH, HIDDEN)
    assert list(mlp.factors()) == ["up", "gate", "down"]
    assert "activation=silu, owns_base=False" in repr(mlp)


def test_every_parameter_gets_a_gradient() -> None:
    model = group(per_role=True)
    model(torch.randn(2, 5, WIDTH)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_rows_that_do_not_fit_their_base() -> None:
    base = SharedBase(torch.zeros(WIDTH, RANK))
    with pytest.raises(InvalidArgument, match="down: has 9 rows, but its base has 8 vectors"):
        SharedMLP(base, factor(RANK), factor(9))
    with pytest.raises(InvalidArgument, match="gate: has 9 rows"):
        SharedMLP(base, factor(RANK), factor(RANK), gate=factor(9))


def test_bases_of_two_kinds() -> None:
    base = SharedBase(torch.zeros(WIDTH, RANK))
    base_out = SharedBase(torch.zeros(WIDTH, RANK), identity=True)
    with pytest.raises(InvalidArgument, match="same identity flag"):
        SharedMLP(base, factor(RANK), factor(RANK + WIDTH), base_out=base_out)


def test_an_unknown_activation() -> None:
    base = SharedBase(torch.zeros(WIDTH, RANK))
    with pytest.raises(InvalidArgument, match="activation: got 'tanh'"):
        SharedMLP(base, factor(RANK), factor(RANK), activation="tanh")
