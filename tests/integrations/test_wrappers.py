"""What wraps a model: DDP, FSDP2 and LoRA adapters of PEFT."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fips_ext.nn.mlp import shared_mlps

from ..tiny_models import build, share

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """One process: sharding and hooks are all there, only nobody to talk to."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model_and_ids() -> tuple[nn.Module, Tensor]:
    model, x = build("llama")
    share(model, rank=8, encoding="bitmap")
    return model, x


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of one training step."""
    model(input_ids=x, labels=x).loss.backward()
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gradients_are_those_without_the_wrapper(kind: str, process_group: None) -> None:
    model, x = model_and_ids()
    expected = step(copy.deepcopy(model), x)
    wrapped = DistributedDataParallel(model) if kind == "ddp" else fully_shard(model)
    found = step(wrapped, x)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_layers_over_one_base_are_one_unit_of_fsdp2(process_group: None) -> None:
    model, x = model_and_ids()
    expected = step(copy.deepcopy(model), x)
    fully_shard(list(model.model.layers))  # they refer to the base that the first of them owns
    fully_shard(model)
    found = step(model, x)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_lora_beside_the_factors(tmp_path: Path) -> None:
    model, x = model_and_ids()
    untouched = copy.deepcopy(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        assert torch.equal(adapted(x).logits, untouched(x).logits)  # adapters begin as zero
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    adapted(input_ids=x, labels=x).loss.backward()
    optimizer.step()
    assert all(mlp.up.values.grad is None for mlp in shared_mlps(adapted).values())
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(untouched, tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted.eval()(x).logits
        assert torch.equal(again.eval()(x).logits, expected)
        with adapted.disable_adapter():
            assert not torch.equal(adapted(x).logits, expected)
