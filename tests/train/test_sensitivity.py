"""Sensitivity: gradients of sampled predictions, and what they say about the divergence of the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fips_ext.errors import InvalidArgument, NumericalError
from fips_ext.surgery import DenseMLP, find_mlps
from fips_ext.train import ActivationStore, Sensitivity, SensitivityMeter, collect

from ..tiny_models import CASES, build

pytestmark = pytest.mark.usefixtures("single_thread")


def measured(
    model: nn.Module, mlps: list[DenseMLP], x: Tensor, passes: int = 1, seed: int = 0
) -> list[Sensitivity]:
    meter = SensitivityMeter(mlps, seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _ in range(passes):
        with meter.attached():
            meter.backward(model(x))
    return meter.result()


@pytest.mark.parametrize("name", CASES)
def test_every_architecture(name: str) -> None:
    model, x = build(name)
    mlps = find_mlps(model)
    for mlp, seen in zip(mlps, measured(model, mlps, x), strict=True):
        assert seen.output.shape == (mlp.width, mlp.width)
        assert seen.up.shape == (mlp.hidden,)
        assert (seen.gate is None) == (mlp.gate is None)
        assert seen.output.isfinite().all()
        assert bool((seen.up >= 0).all())
        torch.testing.assert_close(seen.output, seen.output.t())


def test_are_the_gradients_of_the_drawn_classes() -> None:
    model, x = build("llama")
    mlps = find_mlps(model)
    found = measured(model, mlps, x, seed=5)

    outputs: dict[tuple[int, str], Tensor] = {}

    def keep(key: tuple[int, str]):
        def hook(_module, _args, output: Tensor) -> None:
            output.retain_grad()
            outputs[key] = output

        return hook

    for i, mlp in enumerate(mlps):
        for role, linear in mlp.linears().items():
            linear.weight.requires_grad_()
            linear.register_forward_hook(keep((i, role)))
    logits = model(x).logits
    probabilities = logits.detach().reshape(-1, logits.shape[-1]).softmax(-1)
    drawn = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(5)).flatten()
    F.cross_entropy(logits.reshape(-1, logits.shape[-1]), drawn, reduction="sum").backward()
    for i, seen in enumerate(found):
        for role, expected in (("up", seen.up), ("gate", seen.gate), ("down", seen.output)):
            g = outputs[i, role].grad.flatten(0, -2).double()
            moment = g.t() @ g if role == "down" else g.square().sum(0)
            torch.testing.assert_close(expected, moment / x.numel(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("role", ["up", "down"])
def test_predicts_the_divergence(role: str) -> None:
    """Noise on one tensor raises the divergence per token by half its energy in the metric of gradients."""
    model, x = build("llama")
    model = model.double()
    mlps = find_mlps(model)
    seen = measured(model, mlps, x, passes=400)[1]
    with torch.no_grad():
        dense = F.log_softmax(model(x).logits, -1)
    scale, total, repeats = 1e-3, 0.0, 200
    linear = mlps[1].linears()[role]
    handle = linear.register_forward_hook(lambda _m, _a, y: y + scale * torch.randn_like(y))
    with torch.no_grad():
        for _ in range(repeats):
            noisy = F.log_softmax(model(x).logits, -1)
            total += float((dense.exp() * (dense - noisy)).sum()) / x.numel()
    handle.remove()
    trace = seen.up.sum() if role == "up" else seen.output.diagonal().sum()
    assert total / repeats == pytest.approx(0.5 * scale**2 * float(trace), rel=0.15)


def test_padding_does_not_count() -> None:
    model, x = build("llama")
    mlps = find_mlps(model)
    meters = []
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[:, :5] = True
    for inputs, tokens in ((x, mask), (x[:, :5], None)):
        meter = SensitivityMeter(mlps, 0)
        with meter.attached():
            meter.backward(model(inputs), tokens)
        meters.append(meter)
    assert meters[0].predictions == meters[1].predictions == 5 * len(x)


def test_features_stand_in_for_logits() -> None:
    """A model without classes; and outputs that are neither."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(x)

    model = nn.Sequential(Block(), Block())
    mlps = find_mlps(model)
    x = torch.randn(64, 16)
    seen = measured(model, mlps, x)
    assert float(seen[0].output.diagonal().sum()) > 0
    with pytest.raises(InvalidArgument, match="no floating tensor"):
        SensitivityMeter(mlps, 0).backward({"ids": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(NumericalError, match="NaN or Inf"):
        SensitivityMeter(mlps, 0).backward(torch.full((2, 8), torch.nan))


def test_collecting_leaves_the_model_as_it_was() -> None:
    model, x = build("llama")
    mlps = find_mlps(model)
    frozen = mlps[0].down.weight.requires_grad_(False)
    meter = SensitivityMeter(mlps, 0)
    with ActivationStore([mlp.width for mlp in mlps], 4 * x.numel(), torch.float32) as store:
        collect(model, mlps, [x] * 4, store, meter=meter)
        plain = [inputs.clone() for inputs in store.inputs]
    assert meter.predictions == x.numel()  # a quarter
    assert all(p.grad is None for p in model.parameters())
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert not any(linear._forward_hooks for mlp in mlps for linear in mlp.linears().values())
    with ActivationStore([mlp.width for mlp in mlps], 4 * x.numel(), torch.float32) as store:
        collect(model, mlps, [x] * 4, store)
        for a, b in zip(plain, store.inputs, strict=True):
            torch.testing.assert_close(a, b)


def test_a_seed_gives_the_same_numbers() -> None:
    model, x = build("llama")
    mlps = find_mlps(model)
    first, again, other = (measured(model, mlps, x, seed=seed)[0].output for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
