"""timm: its MLPs, checkpoints of its models, and the commands on images.

A torchvision for another build of torch lacks two operators, without which it cannot be imported; they are
declared here, and nothing calls them.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed: make timm-test", allow_module_level=True)

try:
    import torchvision  # noqa: F401
except RuntimeError:
    _library = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm
from PIL import Image
from typer.testing import CliRunner

import fips_ext
from fips_ext import Recipe, compress
from fips_ext.checkpoint import info
from fips_ext.classification import accuracy
from fips_ext.cli import app
from fips_ext.errors import CheckpointError, InvalidArgument
from fips_ext.integrations import timm as integration
from fips_ext.integrations.images import class_names, labelled_images
from fips_ext.integrations.timm import preprocessing
from fips_ext.models import load_image_model, load_model, reads_images
from fips_ext.surgery import find_mlps

from ..images import save_images
from ..tiny_models import share

pytestmark = pytest.mark.usefixtures("single_thread")

SMALL = {"img_size": 32, "num_classes": 5}
VIT = {**SMALL, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
# Name of timm, arguments, how many MLPs, gated, activation.
CASES = {
    "vit": ("vit_tiny_patch16_224", VIT, 3, False, "gelu"),
    "deit": ("deit_tiny_distilled_patch16_224", VIT, 3, False, "gelu"),
    "deit3": ("deit3_small_patch16_224", VIT, 3, False, "gelu"),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {**SMALL, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)},
        3,
        False,
        "gelu",
    ),
    "eva": ("eva_giant_patch14_224", VIT, 3, False, "gelu"),
    "eva02": ("eva02_tiny_patch14_224", VIT, 3, True, "silu"),
    "dinov2": ("vit_small_patch14_dinov2", VIT, 3, False, "gelu"),
    "swiglu": ("vit_giant_patch14_dinov2", VIT, 3, True, "silu"),
    "beit": ("beit_base_patch16_224", VIT, 3, False, "gelu"),
}


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("pwned"),)


def build(name: str):
    architecture, arguments, *_ = CASES[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, **arguments).eval()
    for parameter in model.parameters():  # some of timm's start so small that a layer does nothing
        torch.nn.init.normal_(parameter, std=0.2)
    return model, torch.randn(4, 3, 32, 32)


@pytest.mark.parametrize("name", CASES)
def test_finds_its_mlps(name: str) -> None:
    model, _ = build(name)
    _, _, count, gated, activation = CASES[name]
    mlps = find_mlps(model)
    assert [(mlp.gate is not None, mlp.activation) for mlp in mlps] == [(gated, activation)] * count


@pytest.mark.parametrize("name", CASES)
def test_compress_save_load_compile_export(name: str, tmp_path: Path) -> None:
    dense, x = build(name)
    base = "identity" if name == "swin" else "shared"
    recipe = Recipe(
        ratio=0.95, pattern="bitmap:16x16", group_size=2, base=base, steps=1, calibration_tokens=64
    )
    compress(dense, recipe, [x] * 8)
    fips_ext.save_pretrained(dense, tmp_path / "m", recipe=recipe)
    # Sizes that only the caller knows: the model is given.
    architecture, arguments, *_ = CASES[name]
    model = fips_ext.from_pretrained(tmp_path / "m", model=timm.create_model(architecture, **arguments))
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(expected, dense(x))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False)
        more = torch.cat([x, x[:2]])
        torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [{"num_classes": 7}, {"num_classes": 0}, {"img_size": 32}, {"in_chans": 1}, {"global_pool": "avg"}],
)
def test_is_built_from_its_folder(arguments: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    share(dense)
    fips_ext.save_pretrained(dense, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert "tags: [fips, compressed, timm]" in (tmp_path / "m" / "README.md").read_text()
    model = fips_ext.from_pretrained(tmp_path / "m")
    x = torch.randn(2, arguments.get("in_chans", 3), *[arguments.get("img_size", 224)] * 2)
    with torch.no_grad():
        assert torch.equal(model(x), dense(x))
    assert model.pretrained_cfg["mean"] == dense.pretrained_cfg["mean"]


@pytest.mark.parametrize("arguments", [{"num_heads": 1}, {"init_values": 1.0}, {"no_embed_class": True}])
def test_what_would_be_built_otherwise_has_no_config(arguments: dict, tmp_path: Path) -> None:
    """A number of heads changes no shape: the default one would load, and compute something else."""
    dense = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    share(dense)
    fips_ext.save_pretrained(dense, tmp_path / "m")
    assert not (tmp_path / "m" / "config.json").exists()
    with pytest.raises(CheckpointError, match="pass it as model="):
        fips_ext.from_pretrained(tmp_path / "m")
    again = timm.create_model("vit_tiny_patch16_224", **arguments)
    model, x = fips_ext.from_pretrained(tmp_path / "m", model=again), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model(x), dense(x))


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "vit_of_tomorrow"},
        {"architecture": "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k"},
        {"architecture": "local-dir:."},
        {"model_args": {"checkpoint_path": "evil.pth"}},
        {"model_args": {"num_classes": "many"}},
        {"model_args": ["num_classes"]},
        {"data": None},
    ],
)
def test_a_config_is_data(changes: dict, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    dense = timm.create_model("vit_tiny_patch16_224")
    share(dense)
    fips_ext.save_pretrained(dense, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        fips_ext.from_pretrained(tmp_path / "m")
    assert not (tmp_path / "pwned").exists()


def test_images_are_prepared_for_the_size_of_the_model() -> None:
    image = Image.new("RGB", (100, 80))
    assert preprocessing(build("vit")[0])(image).shape == (3, 32, 32)
    with pytest.raises(InvalidArgument, match="reads 1 channels"):
        preprocessing(timm.create_model("vit_tiny_patch16_224", in_chans=1))


def test_features_are_no_classifier() -> None:
    model = timm.create_model("vit_tiny_patch16_224", features_only=True)
    assert not integration.is_timm(model)


# -- weights from files ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Of a DeiT-Ti for 3 classes."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "deit.safetensors"
    save_file(timm.create_model("deit_tiny_patch16_224", num_classes=3).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return save_images(tmp_path_factory.mktemp("images"), {"a": 2, "b": 2, "c": 2})


def test_weights_of_a_file(weights: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = timm.create_model("deit_tiny_patch16_224", num_classes=3).eval()
    torch.save({"model": expected.state_dict(), "epoch": 3}, tmp_path / "deit.pth")
    x = torch.randn(1, 3, 224, 224)
    for path in (weights, tmp_path / "deit.pth"):
        model, transform = load_image_model("timm:deit_tiny_patch16_224", path)
        with torch.no_grad():
            assert torch.equal(model(x), expected(x))
        assert model.num_classes == 3
        assert "state_dict" not in model.pretrained_cfg
        assert not model.training
    assert integration.is_timm(model)
    assert callable(transform)


def test_weights_without_a_head(tmp_path: Path) -> None:
    save_file(
        timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "w.safetensors"
    )
    model, _ = load_image_model("timm:vit_tiny_patch16_224", tmp_path / "w.safetensors")
    assert model.num_classes == 0


def test_weights_keep_their_dtype(tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", num_classes=3).bfloat16().state_dict()
    save_file(state, tmp_path / "w.safetensors")
    model, _ = load_image_model("timm:vit_tiny_patch16_224", tmp_path / "w.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model, _ = load_image_model("timm:vit_tiny_patch16_224", tmp_path / "w.safetensors", torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_weights_in_a_layout_that_timm_converts(tmp_path: Path) -> None:
    """As the authors of Swin published theirs: the head has another name, stages end with downsampling."""
    expected = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3).eval()

    def original(name: str) -> str:
        name = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        return name.replace("head.fc.", "head.")

    state = {original(name): tensor for name, tensor in expected.state_dict().items()}
    torch.save({"model": state}, tmp_path / "swin.pth")
    model, _ = load_image_model("timm:swin_tiny_patch4_window7_224", tmp_path / "swin.pth")
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))


def test_weights_that_leave_something_random(tmp_path: Path) -> None:
    """timm itself takes any file for this one."""
    save_file({"vision_model.head.weight": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"leaves \d+ parameters random"):
        load_image_model("timm:vit_base_patch16_siglip_gap_224", tmp_path / "w.safetensors")


def test_refusals(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"has no 'deit_mini'; similar are deit"):
        load_image_model("timm:deit_mini", weights)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_image_model("timm:deit_tiny_patch16_224.of_nobody", weights)
    with pytest.raises(InvalidArgument, match="give its weights file"):
        load_image_model("timm:deit_tiny_patch16_224")
    with pytest.raises(InvalidArgument, match="is not a file"):
        load_image_model("timm:deit_tiny_patch16_224", tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="does not fit timm's vit_small"):
        load_image_model("timm:vit_small_patch16_224", weights)
    with pytest.raises(InvalidArgument, match="has its own"):
        load_image_model(tmp_path, weights)
    with pytest.raises(InvalidArgument, match="give --images"):
        load_model("timm:deit_tiny_patch16_224")


def test_pickled_objects_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 64)
    for name in ("evil.pth", "junk.safetensors"):
        with pytest.raises(CheckpointError, match="not a readable checkpoint"):
            load_image_model("timm:deit_tiny_patch16_224", tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def run(*arguments) -> dict:
    result = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--json")])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_commands(weights: Path, images: Path, tmp_path: Path) -> None:
    name, out = "timm:deit_tiny_patch16_224", tmp_path / "out"
    options = ["--weights", weights, "--images", images, "--ratio", 0.6]
    plan = run("compress", name, *options, "--dry-run")
    assert len({tuple(group["layers"]) for group in plan["groups"]}) == 3
    run("compress", name, *options, "--out", out, "--tokens", 900, "--steps", 1, "--base", "identity")
    assert info(out)["ratios"]["mlp"] <= 0.6
    assert reads_images(out)
    model, transform = load_image_model(out)
    found = run("eval", out, "--images", images)
    assert found["images"] == 6
    assert found["classes"] == 3
    assert found["top5"] == 1
    assert found["top1"] == accuracy(model, images, transform).top1
    speed = run("bench", out, "--dense", name, "--weights", weights, "--batch-size", 2, "--repeats", 1)
    assert speed["ratio"] > 0
    page = tmp_path / "r.html"
    result = CliRunner().invoke(app, ["report", str(out), "--out", str(page), "--no-measure"])
    assert result.exit_code == 0, result.output
    assert "0.6" in page.read_text()


def test_subsets_of_imagenet_are_labelled_by_their_folders(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224")
    names = integration.label_names(model)
    assert len(names) == 1000
    assert names[0] == "n01440764"  # the tench
    save_images(tmp_path, {names[500]: 1, names[3]: 1})
    assert sorted(label for _, label in labelled_images(tmp_path, class_names(model))) == [3, 500]
