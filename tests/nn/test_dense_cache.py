"""Dense copies of factors: the same result, never stale, never saved."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fips_ext.errors import InvalidArgument
from fips_ext.layout import BlockSparse, Encoding
from fips_ext.nn import SharedBase, SharedMLP, SparseFactor, cache_dense
from fips_ext.nn.dense_cache import MIN_TOKENS, DenseCache, choose_form
from fips_ext.nn.mlp import shared_mlps
from fips_ext.reference import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("single_thread")

WIDTH, HIDDEN = 32, 64
FORMS = {8: "zero_filled", WIDTH: "dense"}  # by rank


def model_of(
    rank: int = 8, identity: bool = False, per_role: bool = False, encoding: Encoding = "bitmap"
) -> nn.Sequential:
    """A plain and a gated layer over one base, or one for each side."""
    generator = torch.Generator().manual_seed(1)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) / size[0] ** 0.5

    def factor() -> SparseFactor:
        v = randn(rank + WIDTH * identity, HIDDEN)
        if encoding == "block":
            v[:, 16:] = 0
        elif encoding == "bitmap":
            v *= torch.rand(v.shape, generator=generator) < 0.5
        return SparseFactor(BlockSparse.from_dense(v, (16, 16), encoding))

    base = SharedBase(randn(WIDTH, rank), identity)
    base_out = SharedBase(randn(WIDTH, rank), identity) if per_role else None
    biases = {"up_bias": randn(HIDDEN), "down_bias": randn(WIDTH)}
    plain = SharedMLP(base, factor(), factor(), None, base_out, activation="gelu", **biases)
    gated = SharedMLP(base, factor(), factor(), factor(), base_out, activation="silu", owns_base=False)
    return nn.Sequential(plain, gated).eval()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rank", FORMS)
def test_copies_of_codes_are_their_values(rank: int, bits: int) -> None:
    """Before they are codes, too: what is computed is what they will be."""
    model, x = model_of(rank), tokens()
    with torch.no_grad():
        cache_dense(model)
        exact = model(x)
        for layer in model:
            for factor in layer.factors().values():
                factor.round_to(bits)
        rounded = model(x)
        for layer in model:
            for factor in layer.factors().values():
                factor.quantise()
        codes = model(x)
        cache_dense(model, 0)
        torch.testing.assert_close(codes, model(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(rounded, codes)
    assert not torch.equal(exact, codes)


def tokens(count: int = MIN_TOKENS) -> torch.Tensor:
    return torch.randn(2, count // 2, WIDTH, generator=torch.Generator().manual_seed(0))


def uses_cache(layer: SharedMLP, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> bool:
    calls = []
    forward = type(layer.dense_cache).forward
    monkeypatch.setattr(type(layer.dense_cache), "forward", lambda *args: calls.append(1) or forward(*args))
    layer(x)
    return bool(calls)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("per_role", [False, True])
@pytest.mark.parametrize("rank", FORMS)
@torch.no_grad()
def test_the_copies_compute_the_same(rank: int, per_role: bool, activation: str) -> None:
    model = model_of(rank, per_role=per_role)
    for layer in model:
        layer.activation = activation
    x = tokens()
    expected = [layer(x) for layer in shared_mlps(model).values()]
    assert cache_dense(model) > 0
    for layer, y in zip(shared_mlps(model).values(), expected, strict=True):
        assert layer.dense_cache.form == FORMS[rank]
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", FORMS)
@torch.no_grad()
def test_a_changed_parameter_has_its_copy_remade(rank: int) -> None:
    model, x = model_of(rank), tokens()
    cache_dense(model)
    for layer in shared_mlps(model).values():
        before = layer(x)
        for parameter in (layer.base.weight, layer.up.values, layer.down.values):
            parameter.mul_(1.5)
        changed = layer(x)
        assert not torch.allclose(before, changed)
        layer.dense_cache, cache = None, layer.dense_cache
        torch.testing.assert_close(changed, layer(x), rtol=1e-5, atol=1e-5)
        layer.dense_cache = cache


@torch.no_grad()
def test_the_identity_part_is_computed_the_same() -> None:
    model, x = model_of(8, identity=True), tokens()
    expected = model(x)
    for layer in model:
        layer.dense_cache = DenseCache("zero_filled")
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert cache_dense(model) > 0
    assert model[0].dense_cache.form == "dense"
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_cast_model_has_its_copies_remade() -> None:
    model = model_of()
    cache_dense(model)
    y = model.double()(tokens().double())
    assert y.dtype == torch.float64


def test_few_tokens_and_gradients_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    cache_dense(model)
    layer = next(iter(shared_mlps(model).values()))
    with torch.no_grad():
        assert uses_cache(layer, tokens(), monkeypatch)
        assert not uses_cache(layer, tokens(MIN_TOKENS - 2), monkeypatch)
    x = tokens().requires_grad_()
    layer(x).sum().backward()
    assert layer.up.values.grad is not None


def test_the_bytes_are_those_of_the_copies_and_bounded() -> None:
    model = model_of()
    layers = list(shared_mlps(model).values())
    sizes = [len(layer.factors()) * layer.base.rank * HIDDEN * 4 for layer in layers]
    assert cache_dense(model) == sum(sizes)
    for layer, size in zip(layers, sizes, strict=True):
        assert sum(w.nbytes for w in layer.dense_cache._weights.values()) == size
    assert cache_dense(model, max_bytes=sizes[0]) == sizes[0]
    assert [layer.dense_cache is not None for layer in layers] == [True, False]
    assert cache_dense(model, max_bytes=0) == 0
    assert all(layer.dense_cache is None for layer in layers)


def test_sparse_blocks_have_no_copies() -> None:
    model = model_of(WIDTH, encoding="block")
    assert cache_dense(model) == 0


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_and_files_hold_no_dense_weights(how) -> None:
    model, x = model_of(), tokens()
    names = set(model.state_dict())
    cache_dense(model)
    assert set(model.state_dict()) == names
    twin = how(model)
    assert all(not layer.dense_cache._weights for layer in shared_mlps(twin).values())
    torch.testing.assert_close(twin(x), model(x))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(InvalidArgument, match="max_bytes: got -1"):
        cache_dense(model_of(), max_bytes=-1)
    with pytest.raises(InvalidArgument, match="model: has no SharedMLP"):
        cache_dense(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("rank", "matrices", "identity", "density", "form"),
    [
        (384, 2, False, 0.25, "sparse"),
        (384, 2, False, 1.0, "zero_filled"),  # 768 * 768 + 2 * 3072 * 384 < 2 * 3072 * 768
        (768, 2, False, 1.0, "dense"),
        (768, 3, False, 1.0, "dense"),
        (64, 2, True, 1.0, "dense"),
        (64, 2, True, 0.5, "sparse"),
    ],
)
def test_the_form_with_the_fewest_products_is_chosen(
    rank: int, matrices: int, identity: bool, density: float, form: str
) -> None:
    assert choose_form(768, rank, 3072, matrices, identity, density) == form
