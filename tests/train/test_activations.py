"""Collecting the inputs of MLPs."""

from __future__ import annotations

import pytest
import torch

from fips_ext.errors import InvalidArgument, NumericalError
from fips_ext.surgery import find_mlps
from fips_ext.train import ActivationStore, collect

from ..tiny_models import CASES, build

pytestmark = pytest.mark.usefixtures("single_thread")


def store_of(mlps: list, tokens: int, **options) -> ActivationStore:
    return ActivationStore([mlp.width for mlp in mlps], tokens, torch.float32, **options)


@pytest.mark.parametrize("name", CASES)
def test_collects_what_the_mlps_get(name: str) -> None:
    model, x = build(name)
    mlps = find_mlps(model)
    seen: dict[str, torch.Tensor] = {}

    def remember(key: str):
        def hook(_module, args) -> None:
            seen[key] = args[0].reshape(-1, args[0].shape[-1])

        return hook

    handles = [mlp.entry.register_forward_pre_hook(remember(mlp.name)) for mlp in mlps]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    with store_of(mlps, 8) as store:
        collect(model, mlps, [x], store)
        for mlp, inputs in zip(mlps, store.inputs, strict=True):
            torch.testing.assert_close(inputs, seen[mlp.name][:8])


def test_stops_when_full_and_takes_no_more_data() -> None:
    model, x = build("llama")
    mlps = find_mlps(model)
    taken = []

    def data():
        for i in range(100):
            taken.append(i)
            yield x

    calls: list[tuple[int, int]] = []
    with store_of(mlps, 2 * x.numel() - 1) as store:
        collect(model, mlps, data(), store, lambda done, total: calls.append((done, total)))
    assert taken == [0, 1]
    assert calls[-1] == (2 * x.numel() - 1, 2 * x.numel() - 1)


@pytest.mark.parametrize("name", ["llama", "opt"])  # OPT's MLPs see their tokens without the batch
def test_padding_is_left_out(name: str) -> None:
    model, x = build(name)
    mlps = find_mlps(model)
    mask = torch.ones_like(x)
    mask[1, 7:] = 0
    with store_of(mlps, int(mask.sum())) as store:
        collect(model, mlps, [{"input_ids": x, "attention_mask": mask}], store)
    with store_of(mlps, int(mask.sum()) + 1) as store, pytest.raises(InvalidArgument):
        collect(model, mlps, [{"input_ids": x, "attention_mask": mask}], store)


def test_too_little_data_says_how_much() -> None:
    model, x = build("llama")
    mlps = find_mlps(model)
    with store_of(mlps, 1000) as store, pytest.raises(InvalidArgument, match="24 tokens found, 1000 needed"):
        collect(model, mlps, [x], store)


def test_modes_and_hooks_are_restored() -> None:
    model, x = build("llama")
    model.train()
    model.model.layers[1].eval()
    mlps = find_mlps(model)
    with store_of(mlps, 4) as store:
        collect(model, mlps, [x], store)
    assert model.training
    assert not model.model.layers[1].training
    assert not any(mlp.entry._forward_pre_hooks for mlp in mlps)


def test_spills_to_a_file() -> None:
    model, x = build("llama")
    mlps = find_mlps(model)
    with store_of(mlps, 16, limit=0) as spilled, store_of(mlps, 16) as held:
        assert spilled.spilled
        assert not held.spilled
        for store in (spilled, held):
            collect(model, mlps, [x], store)
        for a, b in zip(spilled.inputs, held.inputs, strict=True):
            torch.testing.assert_close(a, b)


def test_nan_input_names_the_layer() -> None:
    model, x = build("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.fill_(float("inf"))
    mlps = find_mlps(model)
    with store_of(mlps, 4) as store, pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp"):
        collect(model, mlps, [x], store)


def test_a_batch_of_another_type() -> None:
    model, x = build("llama")
    mlps = find_mlps(model)
    with store_of(mlps, 4) as store, pytest.raises(InvalidArgument, match="yields list"):
        collect(model, mlps, [[x]], store)
