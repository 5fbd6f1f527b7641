"""find_mlps: what it finds, and what it leaves alone."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from torch import Tensor, nn

from fips_ext.errors import SurgeryError
from fips_ext.reference import ACTIVATIONS
from fips_ext.surgery import AbsorbedLinear, find_mlps
from fips_ext.surgery.linear_map import module_of, outputs_of

from ..tiny_models import (
    CASES,
    HIDDEN,
    VOCABULARY,
    WIDTH,
    Block,
    GatedMLP,
    PlainMLP,
    Stack,
    build,
    shared_from_dense,
)

pytestmark = pytest.mark.usefixtures("single_thread")


class Function(nn.Module):
    """An activation as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# -- transformers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_finds_the_mlps_of(name: str) -> None:
    case = CASES[name]
    model, _ = build(name)
    mlps = find_mlps(model)
    assert len(mlps) == case.count
    assert mlps[0].name == case.first
    for mlp in mlps:
        assert (mlp.gate is not None, mlp.activation) == (case.gated, case.activation)
        assert mlp.entry is model.get_submodule(mlp.name)
        assert mlp.up.weight.shape == mlp.down.weight.t().shape == (mlp.hidden, mlp.width)
        if mlp.gate is not None:
            names = {id(module): path.rpartition(".")[2] for path, module in mlp.entry.named_modules()}
            found = [names[id(module_of(linear))] for linear in (mlp.gate, mlp.up, mlp.down)]
            fused = ["gate_up_proj", "gate_up_proj", "down_proj"]
            assert found == (fused if name == "phi3" else ["gate_proj", "up_proj", "down_proj"])
            if name == "phi3":
                halves = (slice(0, mlp.hidden), slice(mlp.hidden, 2 * mlp.hidden))
                assert (outputs_of(mlp.gate), outputs_of(mlp.up)) == halves


def test_finds_both_towers_of_clip() -> None:
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {**text, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
    del vision["vocab_size"], vision["bos_token_id"], vision["eos_token_id"]
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    mlps = find_mlps(model)
    assert [mlp.activation for mlp in mlps] == ["quick_gelu"] * 3
    assert mlps[2].name.startswith("vision_model.")


def test_leaves_the_head_of_siglip(caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    with caplog.at_level(logging.WARNING, "fips_ext"):
        mlps = find_mlps(transformers.SiglipVisionModel(config))
    assert len(mlps) == 2
    assert all("head" not in mlp.name for mlp in mlps)
    assert "head" in caplog.text


def test_says_why_a_fused_map_is_none() -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.down = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.both(x).chunk(2, -1)
            return self.down(gate.clamp(-1, 1) * up)

    with pytest.raises(SurgeryError, match="gate and up in one"):
        find_mlps(Stack(Clipped()))


@pytest.mark.parametrize("gate", [0, 1])
def test_either_half_of_a_fused_map_may_be_the_gate(gate: int) -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.down = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            halves = self.both(x).chunk(2, -1)
            return self.down(nn.functional.silu(halves[gate]) * halves[1 - gate])

    mlp = find_mlps(Stack(Fused()))[0]
    weight, bias = mlp.entry.both.weight.chunk(2), mlp.entry.both.bias.chunk(2)
    assert torch.equal(mlp.gate.weight, weight[gate])
    assert torch.equal(mlp.up.bias, bias[1 - gate])
    assert mlp.down is mlp.entry.down


# -- formulas ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "identity"])
@pytest.mark.parametrize("kind", [PlainMLP, GatedMLP])
def test_tells_activations_apart(kind: type, activation: str) -> None:
    mlp = find_mlps(Stack(kind(act=Function(ACTIVATIONS[activation]))))[0]
    assert mlp.activation == activation


def test_tells_gate_from_up_by_what_they_do() -> None:
    mlp = find_mlps(Stack(GatedMLP()))[0]
    assert (mlp.gate, mlp.up, mlp.down) == (mlp.entry.w1, mlp.entry.w3, mlp.entry.w2)


def test_a_bilinear_mlp_is_gated() -> None:
    mlp = find_mlps(Stack(GatedMLP(act=nn.Identity())))[0]
    assert mlp.activation == "identity"
    assert mlp.gate is not mlp.up


def test_square_maps_are_told_apart_too() -> None:
    mlp = find_mlps(Stack(GatedMLP(hidden=WIDTH)))[0]
    assert (mlp.gate, mlp.up, mlp.down) == (mlp.entry.w1, mlp.entry.w3, mlp.entry.w2)


def test_a_sequential_is_an_mlp() -> None:
    sequential = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
    assert find_mlps(Stack(sequential))[0].entry is sequential


def test_a_wrapper_gives_way_to_the_mlp_in_it() -> None:
    inner = PlainMLP()
    assert find_mlps(Stack(nn.Sequential(inner, nn.Dropout(0.1))))[0].entry is inner


@pytest.mark.parametrize(
    "act",
    [
        nn.Tanh(),
        nn.ReLU6(),
        nn.PReLU(),
        Function(lambda x: ACTIVATIONS["gelu"](x).clamp(-10, 10)),
        Function(lambda x: 1.01 * torch.relu(x)),
        nn.Identity(),
    ],
    ids=["tanh", "relu6", "prelu", "clipped", "scaled", "none"],
)
def test_an_unknown_formula_is_no_mlp(act: nn.Module) -> None:
    with pytest.raises(SurgeryError, match="found no MLP"):
        find_mlps(Stack(PlainMLP(act=act)))


def test_an_unknown_formula_among_others_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fips_ext"):
        mlps = find_mlps(Stack(PlainMLP(), PlainMLP(act=nn.Tanh()), PlainMLP()))
    assert [mlp.name for mlp in mlps] == ["blocks.0.mlp", "blocks.2.mlp"]
    assert "blocks.1.mlp" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_and_dtype_do_not_matter(dtype: torch.dtype) -> None:
    model = Stack(PlainMLP(act=nn.GELU(approximate="tanh")), GatedMLP()).to(dtype)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert [mlp.activation for mlp in find_mlps(model)] == ["gelu_tanh", "silu"]


def test_works_without_memory_for_the_weights() -> None:
    with torch.device("meta"):
        model = Stack(PlainMLP(), GatedMLP())
    assert len(find_mlps(model)) == 2


def test_leaves_the_model_as_it_was() -> None:
    model = Stack(PlainMLP(dropout=0.5), GatedMLP()).train()
    calls = []
    model.blocks[0].mlp.register_forward_hook(lambda *_: calls.append("hook"))
    model.blocks[0].mlp.fc1.register_forward_pre_hook(lambda *_: calls.append("hook"))
    state = torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert len(find_mlps(model)) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert not calls
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# -- the split form ----------------------------------------------------------------------------------


class Intermediate(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, HIDDEN)
        self.intermediate_act_fn = act

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))


class Output(nn.Module):
    """Adds the residual itself, as ViT did before transformers 5."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(HIDDEN, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.dropout(self.dense(hidden_states)) + input_tensor


class ScaledOutput(Output):
    """Uses its input beside the linear map, so the map cannot be taken out."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return super().forward(hidden_states, input_tensor) * hidden_states.mean(-1, keepdim=True)


class SplitBlock(nn.Module):
    def __init__(self, act: nn.Module, output: type[Output] = Output) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.intermediate = Intermediate(act)
        self.output = output()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.query(x)
        return self.output(self.intermediate(x), x)


def test_finds_the_split_form() -> None:
    model = nn.Sequential(SplitBlock(nn.GELU()), SplitBlock(nn.ReLU()))
    mlps = find_mlps(model)
    assert [(mlp.name, mlp.activation) for mlp in mlps] == [
        ("0.intermediate", "gelu"),
        ("1.intermediate", "relu"),
    ]
    assert mlps[0].up is model[0].intermediate.dense
    assert mlps[0].down is model[0].output.dense


@pytest.mark.parametrize(
    "block",
    [lambda: SplitBlock(nn.Tanh()), lambda: SplitBlock(nn.GELU(), ScaledOutput)],
    ids=["activation", "output"],
)
def test_half_a_split_form_is_none(block) -> None:
    with pytest.raises(SurgeryError, match="found no MLP"):
        find_mlps(nn.Sequential(block()))


# -- what is left alone ------------------------------------------------------------------------------


class Experts(nn.Module):
    """A router over small MLPs, and one MLP that every token sees."""

    def __init__(self, experts: int, shared: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(GatedMLP() for _ in range(experts))
        self.shared_expert = GatedMLP() if shared else None

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        y = sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        return y if self.shared_expert is None else y + self.shared_expert(x)


def test_experts_are_left_alone() -> None:
    mlps = find_mlps(Stack(Experts(4, shared=True), PlainMLP()))
    assert [mlp.name for mlp in mlps] == ["blocks.0.mlp.shared_expert", "blocks.1.mlp"]
    with pytest.raises(SurgeryError, match="experts behind a router"):
        find_mlps(Stack(Experts(4, shared=False)))


@pytest.mark.parametrize(
    "other",
    [
        lambda: nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN).self_attn,
        lambda: PlainMLP(hidden=16),
        lambda: PlainMLP(width=2, hidden=512, act=nn.ReLU()),
        lambda: nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 10)),
    ],
    ids=["attention", "adapter", "position-bias", "classifier"],
)
def test_other_modules_are_left_alone(other) -> None:
    model = Stack(PlainMLP())
    model.blocks.append(Block(other()))
    assert [mlp.name for mlp in find_mlps(model)] == ["blocks.0.mlp"]


def test_a_linear_map_that_is_more_than_one_is_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    mlp = PlainMLP()
    mlp.fc1 = Scaled(WIDTH, HIDDEN)
    parametrised = PlainMLP()
    nn.utils.parametrizations.weight_norm(parametrised.fc2)
    assert [m.name for m in find_mlps(Stack(mlp, parametrised, PlainMLP()))] == ["blocks.2.mlp"]


def test_a_model_that_is_the_mlp_has_no_place_for_another() -> None:
    with pytest.raises(SurgeryError, match="whole model"):
        find_mlps(PlainMLP())


def test_a_model_without_blocks_may_hold_one_mlp() -> None:
    assert [mlp.name for mlp in find_mlps(Block(PlainMLP()))] == ["mlp"]


# -- shared weights ----------------------------------------------------------------------------------


def test_one_mlp_in_two_places_is_found_once() -> None:
    mlp = PlainMLP()
    found = find_mlps(Stack(mlp, PlainMLP(), mlp))
    assert [m.name for m in found] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert len(found[0].slots) == 2


def test_mlps_over_the_same_parameters_are_found_once() -> None:
    first, second = PlainMLP(), PlainMLP()
    for name in ("fc1", "fc2"):
        for kind in ("weight", "bias"):
            setattr(getattr(second, name), kind, getattr(getattr(first, name), kind))
    found = find_mlps(Stack(first, second))
    assert len(found) == 1
    assert len(found[0].slots) == 2


def test_half_shared_weights_are_refused() -> None:
    first, second = PlainMLP(), PlainMLP()
    second.fc1.weight = first.fc1.weight
    with pytest.raises(SurgeryError, match=r"blocks\.0\.mlp: shares a parameter with blocks\.1\.mlp\.fc1"):
        find_mlps(Stack(first, second))


def test_weights_shared_with_another_module_are_refused() -> None:
    model = Stack(PlainMLP())
    model.decoder = nn.Linear(WIDTH, HIDDEN)
    model.decoder.weight = model.blocks[0].mlp.fc1.weight
    with pytest.raises(SurgeryError, match="decoder"):
        find_mlps(model)


# -- the inline form ---------------------------------------------------------------------------------


class InlineBlock(nn.Module):
    """An MLP as three children of a block, with an attention that answers with a tuple."""

    def __init__(self, order: str = "fc1 act fc2") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = Answering()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)
        self.order = order.split()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(x, mask=mask)[0]
        h = self.norm(x)
        for name in self.order:
            h = getattr(self, name)(h) if name != "double" else 2 * h
        return x + h


class Answering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        return self.out(x), None


def test_an_inline_mlp_is_replaced_by_what_computes_the_same() -> None:
    model = nn.Sequential(InlineBlock(), InlineBlock()).eval()
    x = torch.randn(2, 5, WIDTH)
    expected = model(x)
    mlps = find_mlps(model)
    assert [mlp.name for mlp in mlps] == ["0.fc1", "1.fc1"]
    assert [mlp.activation for mlp in mlps] == ["gelu"] * 2
    for mlp in mlps:
        mlp.install(shared_from_dense(mlp))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(model[0].act, AbsorbedLinear)
    assert isinstance(model[0].fc2, AbsorbedLinear)


def test_an_activation_in_two_blocks_stays_in_the_other() -> None:
    model = nn.Sequential(InlineBlock(), InlineBlock())
    model[1].act = model[0].act
    mlp = find_mlps(model)[0]
    mlp.install(shared_from_dense(mlp))
    assert isinstance(model[1].act, nn.GELU)


@pytest.mark.parametrize("order", ["fc1 fc2", "fc1 double act fc2", "act fc1 fc2", "fc1 act double fc2"])
def test_children_that_do_something_else_are_no_inline_mlp(order: str) -> None:
    with pytest.raises(SurgeryError, match="found no MLP"):
        find_mlps(nn.Sequential(InlineBlock(order)))


def test_an_output_that_needs_the_hidden_activation_is_no_inline_mlp() -> None:
    class Reusing(InlineBlock):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            h = self.act(self.fc1(self.norm(x)))
            return x + self.fc2(h) + h.mean()

    with pytest.raises(SurgeryError, match="found no MLP"):
        find_mlps(nn.Sequential(Reusing(), Reusing()))


def test_inline_maps_in_two_blocks_are_left_alone() -> None:
    model = nn.Sequential(InlineBlock(), InlineBlock(), InlineBlock())
    model[1].fc1, model[1].fc2 = model[0].fc1, model[0].fc2
    assert [mlp.name for mlp in find_mlps(model)] == ["2.fc1"]
