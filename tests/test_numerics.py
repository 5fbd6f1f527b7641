"""Activations and weights that break naive code: a finite result, or an error that names the layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fips_ext import Recipe, compress
from fips_ext.errors import NumericalError
from fips_ext.surgery import find_mlps

from .tiny_models import GatedMLP, PlainMLP, Stack

pytestmark = pytest.mark.usefixtures("single_thread")

TOKENS, WIDTH = 128, 32
RECIPES = {
    "shared": {"base": "shared", "pattern": "bitmap:16x16"},
    "identity": {"base": "identity", "pattern": "block:16x16"},
    "both": {"base": "both", "pattern": "bitmap:16x16", "ratio": 0.95},
    "low-rank": {"pattern": "dense", "ratio": 0.9},
    "codes": {"base": "identity", "pattern": "block:16x16", "bits": 4},
    "output": {"sensitivity": "output", "pattern": "bitmap:16x16"},
}


def model() -> nn.Module:
    torch.manual_seed(0)
    stack = Stack(PlainMLP(), GatedMLP(), GatedMLP()).eval()
    for block in stack.blocks:
        block.norm = nn.Identity()  # the MLPs are to see what comes
    return stack


def tokens() -> Tensor:
    return torch.randn(8, TOKENS // 8, WIDTH, generator=torch.Generator().manual_seed(1))


def compressed(dense: nn.Module, x: Tensor, **fields) -> Tensor:
    """What the compressed model makes of ``x``; its bytes are checked."""
    small = {"ratio": 0.8, "group_size": 2, "steps": 4, "calibration_tokens": TOKENS, "tokens_per_step": 32}
    recipe = Recipe(**{**small, **fields})
    report = compress(dense, recipe, [x])
    assert report.mlp_ratio <= recipe.ratio
    with torch.no_grad():
        return dense(x)


@pytest.fixture(params=RECIPES)
def fields(request) -> dict:
    return RECIPES[request.param]


def rank_two(x: Tensor) -> Tensor:
    return x[..., :2] @ torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(2))


def one_dead(x: Tensor) -> Tensor:
    return x * (torch.arange(WIDTH) != 3)


def one_outlier(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, 0] *= 1000
    return x


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(rank_two, id="of rank 2"),
        pytest.param(one_dead, id="with a dead feature"),
        pytest.param(lambda x: x[:1, :1].expand_as(x).contiguous(), id="constant"),
        pytest.param(torch.zeros_like, id="zero"),
        pytest.param(lambda x: 1e-30 * x, id="tiny"),
        pytest.param(lambda x: 100 * x, id="large"),
        pytest.param(one_outlier, id="with an outlier"),
    ],
)
def test_activations_that_are_finite(fields, change) -> None:
    x = change(tokens())
    assert compressed(model(), x, **fields).isfinite().all()


@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
def test_activations_beyond_float32(fields, value) -> None:
    """Their squares are not finite: no statistics can be taken of them."""
    x = tokens()
    x[3, 2] *= value
    dense = model()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    with pytest.raises(NumericalError, match=r"^(blocks\.\d+\.mlp|model): "):
        compressed(dense, x, **fields)
    assert len(find_mlps(dense)) == 3  # nothing was replaced
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, before[name])


def set_rank_one(weight: Tensor) -> None:
    weight.copy_(torch.outer(weight[:, 0], weight[0]))


def set_tiny_row(weight: Tensor) -> None:
    weight[0] *= 1e-30


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(set_rank_one, id="of rank 1"),
        pytest.param(lambda w: w.zero_(), id="zero"),
        pytest.param(lambda w: w.fill_(0.1), id="constant"),
        pytest.param(lambda w: w.mul_(1e-20), id="tiny"),
        pytest.param(lambda w: w.mul_(5), id="large"),
        pytest.param(set_tiny_row, id="with a tiny row"),
    ],
)
@pytest.mark.parametrize("which", ["all", "down of the second"])
def test_weights_that_are_finite(fields, change, which) -> None:
    dense = model()
    mlps = find_mlps(dense)
    with torch.no_grad():
        for mlp in mlps if which == "all" else mlps[1:2]:
            for role, linear in mlp.linears().items():
                if which == "all" or role == "down":
                    change(linear.weight)
    assert compressed(dense, tokens(), **fields).isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("role", ["up", "down"])
def test_weights_that_are_not(fields, value, role) -> None:
    dense = model()
    with torch.no_grad():
        find_mlps(dense)[1].linears()[role].weight[2, 3] = value
    with pytest.raises(NumericalError, match=rf"blocks\.1\.mlp: {role}\.weight holds NaN or Inf"):
        compressed(dense, tokens(), **fields)


def test_half_precision_that_overflows(fields) -> None:
    """Hidden activations above 65504 in float16; bfloat16 takes the same model."""
    dense = model()
    with torch.no_grad():
        for role, linear in find_mlps(dense)[2].linears().items():
            linear.weight.mul_(1 if role == "down" else 300)
    x = 30 * tokens()
    with pytest.raises(NumericalError, match="bfloat16 or float32"):
        compressed(dense.half(), x.half(), **fields)
    assert len(find_mlps(dense)) == 3  # nothing was replaced
    assert compressed(dense.bfloat16(), x.bfloat16(), **fields).isfinite().all()
