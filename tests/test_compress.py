"""compress on small models: what it installs, what it reports, what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fips_ext import Recipe, calibrate, compress
from fips_ext._compress import clearly_less
from fips_ext._groups import build as build_mlps
from fips_ext._groups import group_mlps, shape_of
from fips_ext.budget import solve
from fips_ext.errors import BudgetError, InvalidArgument, NumericalError, SurgeryError
from fips_ext.init import factorise
from fips_ext.nn.mlp import shared_mlps
from fips_ext.report import Report
from fips_ext.surgery import find_mlps

from .tiny_models import CASES, build

pytestmark = pytest.mark.usefixtures("single_thread")


def recipe(**fields) -> Recipe:
    small = {"pattern": "bitmap:16x16", "group_size": 2, "steps": 5, "tokens_per_step": 32}
    return Recipe(**{"ratio": 0.8, "calibration_tokens": 96, **small, **fields})


def compressed(name: str, **fields) -> tuple[nn.Module, torch.Tensor, Report]:
    model, x = build(name)
    return model, x, compress(model, recipe(**fields), [x] * 8)


@pytest.mark.parametrize("name", [name for name in CASES if name != "swin"])
def test_every_architecture(name: str) -> None:
    model, x, report = compressed(name)
    modules = shared_mlps(model)
    assert len(modules) == len(report.layers) == CASES[name].count
    assert report.mlp_ratio <= 0.8
    assert sum(layer.error_after for layer in report.layers) <= sum(
        layer.error_before for layer in report.layers
    )
    with torch.no_grad():
        output = model(x)
    assert next(iter(output.values())).isfinite().all()


@pytest.mark.parametrize("name", ["llama", "vit", "bert"])
def test_sorting_neurons_does_not_change_what_is_computed(name: str) -> None:
    """Every block kept, and an identity base: the outputs are those of the dense model."""
    model, x = build(name)
    with torch.no_grad():
        for mlp in find_mlps(model):
            for linear in mlp.linears().values():
                if linear.bias is not None:
                    linear.bias.normal_()
        expected = next(iter(model(x).values()))
        group = find_mlps(model)
        plan = solve(recipe(ratio=1.0, base="identity", pattern="block:16x16"), shape_of(group))
        plan = plan.with_count(sum(m.width * m.hidden * len(m.linears()) for m in group) // 256)
        with calibrate(model, [x] * 8, 96) as calibration:
            problems = [calibration.problems(mlp, "loss") for mlp in group]
        factors = factorise(problems, plan, recipe(base="identity", pattern="block:16x16"))
        assert not all(torch.equal(order, order.sort().values) for order in factors.orders)
        for mlp, shared in zip(group, build_mlps(group, factors, plan), strict=True):
            mlp.install(shared)
        torch.testing.assert_close(next(iter(model(x).values())), expected, rtol=1e-3, atol=1e-3)


def test_the_model_decides_what_each_group_stores() -> None:
    """A layer whose output nothing reads keeps next to nothing, and all bytes stay within the ratio."""
    model, x = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-4)
    report = compress(model, recipe(ratio=0.5, group_size=1, steps=0), [x] * 8)
    assert report.mlp_ratio <= 0.5
    sizes = [layer.nbytes for layer in report.layers]
    assert sizes[0] < 0.8 * min(sizes[1:])


def test_stages_of_other_widths_are_other_groups() -> None:
    # The stages are as narrow as 16, where index and base weigh more than they save.
    model, x = build("swin")
    report = compress(model, recipe(ratio=0.95, base="identity"), [x] * 8)
    assert report.mlp_ratio <= 0.95
    assert len({m.width for m in shared_mlps(model).values()}) == 2


@pytest.mark.parametrize(("pattern", "ratio"), [("bitmap:16x16", 0.65), ("block:16x16", 0.8)])
def test_auto_takes_the_better_base_of_each_group(pattern: str, ratio: float) -> None:
    """One block has weights of few directions, the others are sparse already."""
    found = {}
    for base in ("shared", "identity", "auto"):
        torch.manual_seed(1)
        model, x = build("llama")
        with torch.no_grad():
            for layer in (0, 2):
                for weight in model.model.layers[layer].mlp.parameters():
                    edge = 16 if pattern.startswith("block") else 1
                    kept = torch.rand(weight.shape[0] // edge, weight.shape[1] // edge) < 0.5
                    weight.mul_(kept.repeat_interleave(edge, 0).repeat_interleave(edge, 1))
            directions = 5 * torch.randn(32, 6)
            for name, linear in model.model.layers[1].mlp.named_children():
                if isinstance(linear, torch.nn.Linear):
                    product = directions @ torch.randn(6, 64)
                    linear.weight.copy_(product if name == "down_proj" else product.t())
            x = torch.randint(64, (256, 2))
            while x.shape[1] < 32:  # text that the model predicts
                x = torch.cat([x, model(x).logits[:, -1:].argmax(-1)], 1)
        fields = {"ratio": ratio, "group_size": 1, "steps": 0, "ranking": "group", "pattern": pattern}
        found[base] = compress(model, recipe(base=base, calibration_tokens=8192, **fields), [x])
    auto = found["auto"].layers
    assert found["auto"].mlp_ratio <= ratio
    assert auto[1].base.startswith("U")
    assert "I" in {layer.base for layer in auto}
    for index, layer in enumerate(auto):
        same = found["identity" if layer.base == "I" else "shared"].layers[index]
        assert (layer.error_before, layer.nbytes) == (same.error_before, same.nbytes)


@pytest.mark.parametrize("base", ["auto", "shared", "identity", "both"])
@pytest.mark.parametrize("pattern", ["bitmap:16x16", "block:16x16", "dense:16x16"])
@pytest.mark.parametrize("per_role", [False, True])
def test_every_recipe(base: str, pattern: str, per_role: bool) -> None:
    if pattern.startswith("dense") and base in ("identity", "both"):
        with pytest.raises(BudgetError):
            compressed("vit", base=base, pattern=pattern, per_role=per_role)
        return
    _, _, report = compressed("vit", base=base, pattern=pattern, per_role=per_role, ratio=0.9)
    assert report.mlp_ratio <= 0.9


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["llama", "vit", "bert"])
@pytest.mark.parametrize("pattern", ["bitmap:16x16", "block:16x16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_stay_within_the_bytes_and_keep_more(bits, name, pattern, dtype) -> None:
    """At equal bytes, fewer bits a value and more values; what is measured is what is stored."""
    errors, ratio = {}, 0.45 if bits == 4 and pattern.startswith("bitmap") else 0.7
    for choice in (None, bits):
        torch.manual_seed(2)
        model, x = build(name)
        model.to(dtype)
        x = x.to(dtype) if x.is_floating_point() else x
        with torch.no_grad():
            expected = next(iter(model(x).values())).float()
        fields = {"pattern": pattern, "bits": choice, "base": "identity", "distill_steps": 2}
        report = compress(model, recipe(ratio=ratio, **fields), [x] * 8)
        assert report.mlp_ratio <= ratio
        factors = [f for m in shared_mlps(model).values() for f in m.factors().values()]
        assert {f.bits for f in factors} == {choice}
        stored = sum(t.nbytes for m in shared_mlps(model).values() for t in m.state_dict().values())
        assert stored == sum(layer.nbytes for layer in report.layers)
        with torch.no_grad():
            errors[choice] = float((next(iter(model(x).values())).float() - expected).norm())
    assert errors[bits] < errors[None]


@pytest.mark.parametrize("base", ["auto", "shared", "identity"])
@pytest.mark.parametrize("pattern", ["block:16x16", "dense:16x16"])
def test_multiply_adds_within_their_ratio(base: str, pattern: str) -> None:
    if (base, pattern) == ("identity", "dense:16x16"):
        return
    _, _, report = compressed("llama", base=base, pattern=pattern, budget="macs", ratio=0.7, group_size=3)
    assert 0.5 < report.macs_ratio <= 0.7


@pytest.mark.parametrize("bits", [None, 8])
def test_bytes_are_those_of_the_state_dict(bits) -> None:
    model, _, report = compressed("bert", bits=bits)
    stored = sum(
        tensor.numel() * tensor.element_size()
        for mlp in shared_mlps(model).values()
        for tensor in mlp.state_dict().values()
    )
    assert sum(layer.nbytes for layer in report.layers) == stored
    dense = sum(layer.dense_bytes for layer in report.layers)
    reference = sum(
        parameter.numel() * 4
        for mlp in find_mlps(build("bert")[0])
        for linear in mlp.linears().values()
        for parameter in linear.parameters()
    )
    assert dense == reference
    assert report.mlp_ratio == pytest.approx(stored / dense)
    assert report.mlp_ratio < report.linear_ratio < report.model_ratio < 1


def test_a_base_is_shared_inside_its_group_only() -> None:
    model, _, _ = compressed("llama", group_size=2)
    a, b, c = shared_mlps(model).values()
    # Three layers in groups of at most two, as even as can be.
    assert [m.owns_base for m in (a, b, c)] in ([True, False, True], [True, True, False])
    assert len({id(m.base) for m in (a, b, c)}) == 2


def test_groups_are_even() -> None:
    mlps = find_mlps(build("llama")[0])
    assert [len(g) for g in group_mlps(mlps, 2)] == [1, 2]
    assert [len(g) for g in group_mlps(mlps, 3)] == [3]
    assert [len(g) for g in group_mlps(mlps, 1)] == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    model, x = build("llama")
    model.to(dtype)
    report = compress(model, recipe(), [x] * 8)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert report.mlp_ratio <= 0.8
    assert model(x).logits.isfinite().all()


def test_the_base_is_chosen_in_eval_mode() -> None:
    """And in whatever dtype products are asked for: the same bases, and the model in the mode it was in."""
    chosen = []
    for training in (False, True):
        torch.manual_seed(4)
        model, x = build("llama")
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3 if training else 0.0
        model.to(torch.bfloat16).train(training)
        report = compress(model, recipe(group_size=1), [x] * 8, compute_dtype=torch.float32)
        chosen.append([(layer.base, layer.error_before) for layer in report.layers])
        assert model.training == training
    assert chosen[0] == chosen[1]


def test_data_free() -> None:
    model, x = build("vit")
    report = compress(model, recipe(init="svd", steps=0), None)
    assert report.mlp_ratio <= 0.8
    assert all(layer.error_after is None for layer in report.layers)
    assert model(x).logits.isfinite().all()
    with pytest.raises(InvalidArgument, match="init='svd'"):
        compress(build("vit")[0], recipe(), None)


def test_a_second_run_gives_the_same_model() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(compressed("llama")[0].state_dict())
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


def test_progress_rises_to_the_total() -> None:
    model, x = build("llama")
    calls: list[tuple[int, int]] = []
    compress(model, recipe(), [x] * 8, progress=lambda done, total: calls.append((done, total)))
    done = [d for d, _ in calls]
    assert done == sorted(done)
    assert len({total for _, total in calls}) == 1
    assert calls[-1][0] == calls[-1][1]


def test_report_round_trip_and_table() -> None:
    _, _, report = compressed("bert")
    assert Report.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report
    table = report.to_markdown()
    assert all(layer.name in table for layer in report.layers)
    assert f"{report.mlp_ratio:.4f}" in table
    assert report.seconds > 0
    assert report.peak_memory > 0


def test_refusals_leave_the_model_dense() -> None:
    model, x = build("llama")
    data = [x] * 8
    for fields, error, message in (
        ({"ratio": 0.01}, BudgetError, "need at least"),
        ({"rank": 33}, InvalidArgument, "rank: got 33"),
        ({"calibration_tokens": 10_000}, InvalidArgument, "192 tokens found, 10000 needed"),
    ):
        with pytest.raises(error, match=message):
            compress(model, recipe(**fields), data)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(NumericalError, match=r"model\.layers\.2\.mlp"):
        compress(model, recipe(), data)
    assert not shared_mlps(model)
    with pytest.raises(SurgeryError):
        compress(nn.Linear(4, 4), recipe(), data)


def test_a_base_must_save_more_than_chance_and_margin() -> None:
    identity = torch.full((1000,), 1.0)
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert clearly_less(identity - 0.06, identity)
    assert not clearly_less(identity - 0.04, identity)
    assert not clearly_less(identity - 0.06 + noise, identity)
    assert clearly_less(identity - 0.3 + noise, identity)
    assert not clearly_less(torch.zeros(1), torch.ones(1))  # one prediction tells nothing of chance


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"include": ["*.layers.[02].*"]}, [0, 2]),
        ({"exclude": ["model.layers.1.mlp"]}, [0, 2]),
        ({"include": ("*.0.mlp", "*.1.mlp"), "exclude": ("*.0.*",)}, [1]),
    ],
)
def test_only_what_is_selected(fields: dict, expected: list[int]) -> None:
    model, x = build("llama")
    with calibrate(model, [x] * 8, 96) as calibration:
        report = compress(model, recipe(**fields), calibration)
    assert [layer.name for layer in report.layers] == [f"model.layers.{i}.mlp" for i in expected]
    assert list(shared_mlps(model)) == [f"model.layers.{i}.mlp" for i in expected]
    assert report.mlp_ratio <= 0.8
    assert len(find_mlps(model)) == 3 - len(expected)  # they can be compressed later


def test_calibration_is_of_the_mlp_that_is_selected() -> None:
    """By name: the same MLP, alone or with all others, comes out the same."""
    found = []
    for fields in ({}, {"include": ["*.2.mlp"]}):
        torch.manual_seed(1)
        model, x = build("llama")
        compress(model, recipe(group_size=1, base="identity", ranking="group", **fields), [x] * 8)
        found.append(model.model.layers[2].mlp.state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"include": ["*.7.mlp"]}, r"'\*\.7\.mlp' is the name of no MLP; there are model\.layers\.0\.mlp"),
        ({"exclude": ["typo"]}, "'typo' is the name of no MLP"),
        ({"exclude": ["*"]}, "nothing is left"),
    ],
)
def test_a_selection_that_fits_nothing(fields: dict, message: str) -> None:
    model, x = build("llama")
    with pytest.raises(InvalidArgument, match=message):
        compress(model, recipe(**fields), [x] * 8)


def test_a_selection_that_is_no_list() -> None:
    with pytest.raises(InvalidArgument, match="include: got"):
        recipe(include="*.mlp")
    chosen = recipe(include=["a", "b"])
    assert Recipe.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", "1e-3"),
        ("pattern", None),
        ("include", 5),
        ("refit", "false"),
        ("per_role", 1),
        ("ratio", True),
        ("steps", True),
    ],
)
def test_a_field_of_another_type(field: str, value: object) -> None:
    with pytest.raises(InvalidArgument, match=f"{field}: got"):
        recipe(**{field: value})
