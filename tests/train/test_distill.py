"""distill: the whole compressed model against the dense one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fips_ext import Recipe, calibrate, compress
from fips_ext.errors import InvalidArgument, NumericalError
from fips_ext.nn.mlp import shared_mlps
from fips_ext.surgery import DenseMLP, find_mlps
from fips_ext.train import distill

from ..tiny_models import CASES, build, shared_from_dense

pytestmark = pytest.mark.usefixtures("single_thread")


def damaged(name: str, noise: float = 1.0) -> tuple[nn.Module, Tensor, list[DenseMLP], list]:
    """A model whose MLPs are shared factors, off by some noise."""
    model, x = build(name)
    dense = find_mlps(model)
    shared = []
    for mlp in dense:
        module = shared_from_dense(mlp)
        with torch.no_grad():
            for factor in module.factors().values():
                factor.values += noise * factor.values.std() * torch.randn_like(factor.values)
        mlp.install(module)
        shared.append(module)
    return model, x, dense, shared


def run(name: str, steps: int = 60, **options):
    model, x, dense, shared = damaged(name)
    arguments = {"learning_rate": 0.03, "compute_dtype": torch.float32, **options}
    return distill(model, dense, shared, [x] * 8, steps=steps, **arguments), model, x, dense, shared


@pytest.mark.parametrize("name", CASES)
def test_brings_the_model_nearer_to_the_dense_one(name: str) -> None:
    (before, after), *_ = run(name)
    assert 0 <= after < 0.8 * before


def test_measures_the_divergence_of_the_predictions() -> None:
    model, x, dense, shared = damaged("llama")
    (before, after) = distill(
        model, dense, shared, [x], steps=0, learning_rate=0.01, compute_dtype=torch.float32
    )
    with torch.no_grad():
        found = F.log_softmax(model(x).logits.double(), -1)
        for mlp in dense:
            mlp.slots[0].fill(mlp.entry)
        expected = F.log_softmax(model(x).logits.double(), -1)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    assert before == after == pytest.approx(float(divergence), rel=1e-3)


def test_padding_is_left_out() -> None:
    model, x, dense, shared = damaged("llama")
    mask = torch.ones_like(x)
    mask[:, 6:] = 0
    options = {"steps": 0, "learning_rate": 0.01, "compute_dtype": torch.float32}
    cut, _ = distill(model, dense, shared, [x[:, :6]], **options)
    padded, _ = distill(model, dense, shared, [{"input_ids": x, "attention_mask": mask}], **options)
    assert padded == pytest.approx(cut, rel=1e-3)


def test_trains_the_factors_only_and_leaves_flags_and_modules() -> None:
    model, x, dense, shared = damaged("llama")
    rest = {n: p.detach().clone() for n, p in model.named_parameters() if ".mlp." not in n}
    masks = [f.row_idx.clone() for m in shared for f in m.factors().values()]
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    distill(model, dense, shared, [x] * 2, steps=3, learning_rate=0.02, compute_dtype=torch.float32)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[n], p) for n, p in rest.items())
    assert all(
        torch.equal(a, f.row_idx)
        for a, f in zip(masks, (f for m in shared for f in m.factors().values()), strict=True)
    )
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in parameters.values() if p is not frozen)
    assert list(shared_mlps(model).values()) == shared


def test_what_gets_worse_is_thrown_away() -> None:
    model, x, dense, shared = damaged("vit")
    state = [{k: v.clone() for k, v in m.state_dict().items()} for m in shared]
    before, after = distill(
        model, dense, shared, [x] * 2, steps=5, learning_rate=10.0, compute_dtype=torch.float32
    )
    assert before == after
    for m, kept in zip(shared, state, strict=True):
        assert all(torch.equal(v, kept[k]) for k, v in m.state_dict().items())


def test_nan_is_an_error_that_says_what_to_do() -> None:
    model, x, dense, shared = damaged("llama")
    with torch.no_grad():
        shared[0].up.values[0, 0, 0] = float("nan")
    with pytest.raises(NumericalError, match="learning_rate"):
        distill(model, dense, shared, [x], steps=1, learning_rate=0.1, compute_dtype=torch.float32)
    assert list(shared_mlps(model).values()) == shared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_a_stage_of_compress(dtype: torch.dtype) -> None:
    fields = {"ratio": 0.7, "pattern": "bitmap:16x16", "group_size": 2, "steps": 2, "tokens_per_step": 32}
    recipe = Recipe(calibration_tokens=96, distill_steps=30, distill_learning_rate=0.005, **fields)
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        model, x = build("llama")
        model.to(dtype)
        report = compress(model, recipe, [x] * 8)
        states.append(model.state_dict())
    assert report.divergence_after < report.divergence_before
    assert report.mlp_ratio <= 0.7
    assert sum(layer.nbytes for layer in report.layers) == round(
        report.mlp_ratio * sum(layer.dense_bytes for layer in report.layers)
    )
    assert "nats" in report.to_markdown()
    assert all(p.dtype == dtype for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_needs_the_batches() -> None:
    model, x = build("llama")
    recipe = Recipe(ratio=0.7, pattern="bitmap:16x16", steps=0, distill_steps=1, calibration_tokens=48)
    with (
        calibrate(model, [x] * 4, 48) as calibration,
        pytest.raises(InvalidArgument, match="keep_batches"),
    ):
        compress(model, recipe, calibration)
