from __future__ import annotations

import itertools

import pytest
import torch

from fips_ext import functional, reference

from .cases import DTYPES, isa, leaves, random_mlp, relative_error, with_leaves

__all__ = ["isa"]

VARIANTS = [
    pytest.param(*flags, id=f"gated={flags[0]}-bias={flags[1]}-identity={flags[2]}-per_role={flags[3]}")
    for flags in itertools.product([False, True], repeat=4)
]
# The chain rounds four intermediate results to the element type; float32 sums over a few hundred terms.
CHAIN_TOLERANCE = {
    torch.float32: 2e-6,
    torch.bfloat16: 1.2e-2,
    torch.float16: 1.5e-3,
    torch.float64: 1e-13,
}


def flat_arguments(mlp: dict) -> tuple:
    """Positional arguments of ``torch.ops.fips.shared_mlp`` after x."""
    return (
        mlp["base"],
        mlp["base_out"],
        mlp["up"].tensors(),
        None if mlp["gate"] is None else mlp["gate"].tensors(),
        mlp["down"].tensors(),
        mlp["up_bias"],
        mlp["gate_bias"],
        mlp["down_bias"],
        mlp["up"].cols,
        mlp["activation"],
        mlp["identity"],
    )


def in_double(mlp: dict) -> dict:
    return with_leaves(mlp, {name: t.double() for name, t in leaves(mlp).items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_matches_oracle_on_every_isa(isa, dtype, activation):
    for gated, encoding, tokens in itertools.product([False, True], ["block", "bitmap"], [1, 50]):
        mlp = random_mlp(gated, True, False, True, encoding, dtype, activation=activation)
        x = torch.randn(tokens, 24).to(dtype)
        expected = reference.shared_mlp(x.double(), **in_double(mlp))
        assert relative_error(functional.shared_mlp(x, **mlp), expected) < CHAIN_TOLERANCE[dtype]


@pytest.mark.parametrize(("gated", "bias", "identity", "per_role"), VARIANTS)
@pytest.mark.parametrize("encoding", ["block", "bitmap"])
def test_gradcheck(gated, bias, identity, per_role, encoding):
    mlp = random_mlp(gated, bias, identity, per_role, encoding)
    inputs = {name: t.clone().requires_grad_() for name, t in leaves(mlp).items()}
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return functional.shared_mlp(x, **with_leaves(mlp, dict(zip(inputs, values, strict=True))))

    assert torch.autograd.gradcheck(run, (x, *inputs.values()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [5, 100])
def test_gradients_match_oracle(dtype, tokens):
    mlp = random_mlp(True, True, False, False, "bitmap", dtype, activation="silu")
    x = torch.randn(tokens, 24).to(dtype)
    grad = torch.randn(tokens, 24).to(dtype)
    results = []
    for call, arguments, cast in (
        (functional.shared_mlp, mlp, dtype),
        (reference.shared_mlp, in_double(mlp), torch.float64),
    ):
        inputs = {name: t.clone().requires_grad_() for name, t in leaves(arguments).items()}
        data = x.to(cast).requires_grad_()
        y = call(data, **with_leaves(arguments, inputs))
        results.append(torch.autograd.grad(y, [data, *inputs.values()], grad.to(cast)))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 2 * CHAIN_TOLERANCE[dtype]


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated):
    mlp = random_mlp(gated, gated, False, not gated, "bitmap")
    inputs = {name: t.clone().requires_grad_() for name, t in leaves(mlp).items()}
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    arguments = flat_arguments(with_leaves(mlp, inputs))
    torch.library.opcheck(torch.ops.fips.shared_mlp.default, (x, *arguments))
    plain = flat_arguments(mlp)
    torch.library.opcheck(torch.ops.fips.shared_mlp_backward.default, (x.detach(), x.detach(), *plain))
    target = torch.randn(5, 24, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.fips.reconstruction_loss.default, (x.detach(), target, torch.rand(5), 0.5, *arguments)
    )


def test_plain_pruning_and_low_rank_are_special_cases():
    mlp = random_mlp(True, False, True, False, "bitmap", rank=0)
    x = torch.randn(7, 24, dtype=torch.float64)
    up, gate, down = (mlp[role].to_dense() for role in ("up", "gate", "down"))
    expected = (reference.ACTIVATIONS["gelu"](x @ gate) * (x @ up)) @ down.t()
    assert mlp["base"].shape == (24, 0)
    assert relative_error(functional.shared_mlp(x, **mlp), expected) < 1e-13


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    mlp = random_mlp(True, True, True, True, "block", torch.float32)
    x = torch.randn(tokens, 24, requires_grad=True)
    y = functional.shared_mlp(x, **mlp)
    assert y.shape == (tokens, 24)
    y.sum().backward()
    assert x.grad.shape == (tokens, 24)
    loss = functional.reconstruction_loss(x.detach(), torch.zeros(tokens, 24), 1.0, **mlp)
    assert torch.isfinite(loss)


def test_chunks_do_not_change_the_result():
    """More tokens than one chunk holds (4 Mi elements over hidden = 4096)."""
    mlp = random_mlp(False, True, False, False, "block", torch.float32, hidden=4096)
    x = torch.randn(2500, 24)
    expected = reference.shared_mlp(x.double(), **in_double(mlp))
    assert relative_error(functional.shared_mlp(x, **mlp), expected) < 2e-6


@pytest.mark.parametrize(("gated", "bias", "identity", "per_role"), VARIANTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_reconstruction_loss_gradients(gated, bias, identity, per_role, weighted):
    mlp = random_mlp(gated, bias, identity, per_role, "bitmap")
    x, target = torch.randn(3, 3, 24, dtype=torch.float64), torch.randn(3, 3, 24, dtype=torch.float64)
    token_weight = torch.rand(3, 3) if weighted else None
    gradients, losses = [], []
    for call in (functional.reconstruction_loss, reference.reconstruction_loss):
        inputs = {name: t.clone().requires_grad_() for name, t in leaves(mlp).items()}
        loss = call(x, target, 0.25, token_weight=token_weight, **with_leaves(mlp, inputs))
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(3 * loss, list(inputs.values())))
    torch.testing.assert_close(losses[0], losses[1])
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize(("scale", "mean"), [(1e-7, 0.0), (1e-7, 4.0)], ids=["tiny", "large"])
def test_reconstruction_loss_in_float16_stays_in_range(scale, mean):
    """Gradients near 1e-7, below the normal range, and sums beyond 65504 before they are scaled."""
    mlp = random_mlp(False, False, False, False, "block", torch.float16, activation="relu")
    x, target = (torch.randn(2048, 24) + mean).half(), torch.randn(2048, 24).half()
    gradients = []
    for call, arguments, cast in (
        (functional.reconstruction_loss, mlp, torch.float16),
        (reference.reconstruction_loss, in_double(mlp), torch.float64),
    ):
        inputs = {name: t.clone().requires_grad_() for name, t in leaves(arguments).items()}
        loss = call(x.to(cast), target.to(cast), scale, **with_leaves(arguments, inputs))
        gradients.append(torch.autograd.grad(loss * 10, list(inputs.values())))
    assert loss.dtype in (torch.float32, torch.float64)
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected) < 1e-2


def test_reconstruction_loss_refuses_what_it_cannot_differentiate():
    mlp = random_mlp(True, False, False, False, "block")
    values = mlp["up"].values.clone().requires_grad_()
    arguments = {**mlp, "up": mlp["up"].with_values(values)}
    x = torch.randn(4, 24, dtype=torch.float64)
    loss = functional.reconstruction_loss(x, x, 1.0, **arguments)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(loss, values, create_graph=True)
    loss = functional.reconstruction_loss(x.requires_grad_(), x.detach(), 1.0, **arguments)
    with pytest.raises(RuntimeError, match="no gradient of x, target or token_weight"):
        loss.backward()


def test_chunks_do_not_change_gradients():
    mlp = random_mlp(True, True, False, True, "bitmap", hidden=4096)
    x, target = torch.randn(2500, 24, dtype=torch.float64), torch.randn(2500, 24, dtype=torch.float64)
    weight = torch.rand(2500)
    gradients = []
    for call in (functional.reconstruction_loss, reference.reconstruction_loss):
        inputs = {name: t.clone().requires_grad_() for name, t in leaves(mlp).items()}
        loss = call(x, target, 1e-3, token_weight=weight, **with_leaves(mlp, inputs))
        gradients.append(torch.autograd.grad(loss, list(inputs.values())))
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected) < 1e-11


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_nan_reaches_the_output(activation):
    mlp = random_mlp(False, False, True, False, "block", torch.float32, rank=0, activation=activation)
    x = torch.randn(40, 24)
    x[3] = float("nan")
    y = functional.shared_mlp(x, **mlp)
    assert bool(y[3].isnan().all())
    assert bool(y[:3].isfinite().all())


def test_backward_inside_autocast():
    mlp = random_mlp(True, True, False, False, "bitmap", torch.float32)
    inputs = {name: t.clone().requires_grad_() for name, t in leaves(mlp).items()}
    y = functional.shared_mlp(torch.randn(40, 24), **with_leaves(mlp, inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(y.sum(), list(inputs.values()), retain_graph=True)
    for a, b in zip(inside, torch.autograd.grad(y.sum(), list(inputs.values())), strict=True):
        assert torch.equal(a, b)


def test_autocast_runs_in_the_autocast_dtype():
    mlp = random_mlp(True, True, False, False, "bitmap", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.shared_mlp(torch.randn(3, 24), **mlp).dtype == torch.bfloat16
        x = torch.randn(3, 24)
        loss = functional.reconstruction_loss(x, x, 1.0, token_weight=torch.rand(3), **mlp)
    assert loss.dtype == torch.float32


def test_compiles_without_graph_breaks():
    mlp = random_mlp(True, True, False, False, "bitmap", torch.float32)
    x = torch.randn(4, 24)
    compiled = torch.compile(lambda x: functional.shared_mlp(x, **mlp), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), functional.shared_mlp(x, **mlp))
