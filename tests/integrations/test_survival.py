"""Every architecture through compress, save, load, torch.compile and torch.export, with equal outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fips_ext
from fips_ext import Recipe, compress

from ..tiny_models import CASES, build

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def arguments(name: str, x: Tensor) -> dict[str, Any]:
    if CASES[name].inputs == "pixels":
        return {"pixel_values": x}
    # A cache is an output that no graph holds.
    return {"input_ids": x} if name == "bert" else {"input_ids": x, "use_cache": False}


@pytest.mark.parametrize("name", CASES)
def test_compress_save_load_compile_export(name: str, tmp_path: Path) -> None:
    dense, x = build(name)
    # The stages of Swin are too narrow for a base to pay.
    base = "identity" if name == "swin" else "shared"
    recipe = Recipe(
        ratio=0.95, pattern="bitmap:16x16", group_size=2, base=base, steps=2, calibration_tokens=96
    )
    compress(dense, recipe, [x] * 8)
    fips_ext.save_pretrained(dense, tmp_path / "m", recipe=recipe)
    model = fips_ext.from_pretrained(tmp_path / "m")
    given = arguments(name, x)
    with torch.no_grad():
        expected = model(**given)[0]
        assert torch.equal(expected, dense(**given)[0])
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**given)[0], expected, rtol=1e-4, atol=1e-5)

    # Another batch, and other lengths, than it was exported with.
    batch, length = Dim("batch", min=2, max=64), Dim("length", min=2, max=32)
    ids = CASES[name].inputs == "ids"
    shapes: dict[str, Any] = dict.fromkeys(given)
    shapes[next(iter(given))] = {0: batch, 1: length} if ids else {0: batch}
    program = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False)
    other = torch.cat([x, x[:1]])
    given = arguments(name, other[:, :7] if ids else other)
    with torch.no_grad():
        found, wanted = program.module()(**given)[0], model(**given)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def small_llama() -> tuple[nn.Module, Tensor]:
    model, x = build("llama")
    recipe = Recipe(
        ratio=0.9, pattern="bitmap:16x16", group_size=3, base="shared", steps=0, calibration_tokens=96
    )
    compress(model, recipe, [x] * 8)
    return model, x


def gradients(model: nn.Module, run: Any, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    run(input_ids=x, labels=x).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_training_step(backend: str) -> None:
    model, x = small_llama()
    expected = gradients(model, model, x)
    found = gradients(model, torch.compile(model, fullgraph=True, backend=backend), x)
    assert (
        found.keys() == expected.keys() >= {"model.layers.0.mlp.base.weight", "model.layers.2.mlp.up.values"}
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_an_aot_inductor_package(tmp_path: Path) -> None:
    model, x = small_llama()
    given = {"input_ids": x, "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (), given, strict=False)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "m.pt2"))
        found = torch._inductor.aoti_load_package(package)(**given)[0]
        torch.testing.assert_close(found, model(**given)[0], rtol=1e-3, atol=1e-4)


def test_autocast() -> None:
    model, x = small_llama()
    with torch.no_grad():
        expected = model(x).logits
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x).logits
    assert found.dtype == torch.bfloat16
    assert float((found - expected).norm() / expected.norm()) < 0.05
