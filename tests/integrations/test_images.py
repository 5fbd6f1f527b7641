"""Image folders, accuracy, and the commands on a transformers model that sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from fips_ext.classification import _wilson, accuracy, compare_speed
from fips_ext.cli import app
from fips_ext.errors import CheckpointError, InvalidArgument, NumericalError
from fips_ext.integrations.images import (
    calibration_images,
    class_names,
    image_files,
    input_shape,
    labelled_images,
    read_image,
)
from fips_ext.models import load_image_model, load_model, reads_images

from ..images import save_images, save_vit

pytestmark = pytest.mark.usefixtures("single_thread")


def pixels(image: Image.Image) -> torch.Tensor:
    """The mean colour, as an image of 32×32."""
    return torch.tensor(image.resize((1, 1)).getpixel((0, 0))).float()[:, None, None].expand(3, 32, 32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_images(tmp_path / "images", {"a": 3, "b": 2, "c": 4})


# -- folders ------------------------------------------------------------------------------------------


def test_finds_images_by_suffix(folder: Path) -> None:
    (folder / "a" / "notes.txt").write_text("not an image")
    (folder / "a" / "UPPER.JPG").write_bytes((folder / "a" / "0.png").read_bytes())
    found = image_files(folder)
    assert len(found) == 10
    assert found == sorted(found)


def test_calibration_sees_every_image_once(folder: Path) -> None:
    batches = list(calibration_images(folder, pixels, torch.bfloat16))
    assert [batch.shape[0] for batch in batches] == [8, 1]
    assert all(batch.dtype == torch.bfloat16 for batch in batches)
    expected = torch.stack([pixels(read_image(path)).bfloat16() for path in image_files(folder)])
    found = torch.cat(batches)
    assert sorted(found[:, :, 0, 0].tolist()) == sorted(expected[:, :, 0, 0].tolist())
    again = torch.cat(list(calibration_images(folder, pixels, torch.bfloat16)))
    assert torch.equal(found, again)
    other = torch.cat(list(calibration_images(folder, pixels, torch.bfloat16, seed=1)))
    assert not torch.equal(found, other)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["c", "x", "b", "a"], [3, 3, 3, 2, 2, 0, 0, 0, 0]),  # by their names
        (["0", "1", "2"], [0, 0, 0, 1, 1, 2, 2, 2, 2]),  # the model knows no names
        (["LABEL_0", "LABEL_1", "LABEL_2"], [0, 0, 0, 1, 1, 2, 2, 2, 2]),
    ],
)
def test_labels(folder: Path, names: list[str], expected: list[int]) -> None:
    assert [label for _, label in labelled_images(folder, names)] == expected


def test_labels_that_are_numbers(tmp_path: Path) -> None:
    save_images(tmp_path, {"10": 1, "2": 1})
    names = [f"class {number}" for number in range(12)]
    assert {path.parent.name: label for path, label in labelled_images(tmp_path, names)} == {"10": 10, "2": 2}


def test_labels_that_are_wordnet_ids(tmp_path: Path) -> None:
    save_images(tmp_path, {"n01484850": 1, "n01440764": 2})
    found = [label for _, label in labelled_images(tmp_path, ["tench", "great white shark"])]
    assert found == [0, 0, 1]


@pytest.mark.parametrize(
    "names",
    [
        ["A", "B", "C"],  # nearly
        ["cat", "dog", "cow"],  # others, though as many
        ["a", "b", "c", "c"],  # which c?
        [str(number) for number in range(7)],  # fewer folders than classes
    ],
)
def test_labels_in_doubt_are_refused(folder: Path, names: list[str]) -> None:
    with pytest.raises(InvalidArgument, match="cannot be told"):
        labelled_images(folder, names)


def test_numbers_that_start_at_one_are_refused(tmp_path: Path) -> None:
    save_images(tmp_path, {"1": 1, "2": 1, "3": 1})
    with pytest.raises(InvalidArgument, match="by the numbers \\(from 0\\)"):
        labelled_images(tmp_path, ["0", "1", "2"])


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="not a folder"):
        image_files(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArgument, match="holds no image"):
        image_files(tmp_path / "empty")
    (folder / "loose.png").write_bytes((folder / "a" / "0.png").read_bytes())
    with pytest.raises(InvalidArgument, match=r"loose.png has no label"):
        labelled_images(folder, ["a", "b", "c"])
    (folder / "loose.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    with pytest.raises(InvalidArgument, match=r"loose.png cannot be read"):
        read_image(folder / "loose.png")


def test_an_image_without_three_channels(tmp_path: Path) -> None:
    Image.new("LA", (4, 4), (7, 255)).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").getpixel((0, 0)) == (7, 7, 7)


# -- accuracy -----------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Classifies an image by its first pixel."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.num_classes = classes
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        distance = (x[:, 0, 0, :1] - torch.arange(self.num_classes)).abs()
        return -self.scale * distance


def test_accuracy_counts(folder: Path) -> None:
    shades = iter([0, 0, 1, 1, 6, 2, 2, 5, 0])  # per image, in the order of their paths; 3 a, 2 b, 4 c
    model = Reader(8)
    (folder / "empty").mkdir()  # is no class

    def transform(_image: Image.Image) -> torch.Tensor:
        return torch.full((3, 2, 2), float(next(shades)))

    for old, new in (("a", "0"), ("b", "1"), ("c", "2")):
        (folder / old).rename(folder / new)
    found = accuracy(model, folder, transform, batch_size=2)
    # Right at once are 0, 0, 1, 2 and 2; the five nearest of 1 hold 0, those of 0 hold 2.
    assert (found.images, found.classes) == (9, 8)
    assert found.top1 == pytest.approx(5 / 9)
    assert found.top5 == pytest.approx(7 / 9)
    low, high = found.interval
    assert low < found.top1 < high


@pytest.mark.parametrize(("right", "low", "high"), [(0, 0.0, 0.2775), (10, 0.7225, 1.0), (5, 0.2366, 0.7634)])
def test_wilson(right: int, low: float, high: float) -> None:
    assert _wilson(right / 10, 10) == pytest.approx((low, high), abs=1e-4)


def test_accuracy_refuses(folder: Path) -> None:
    with pytest.raises(InvalidArgument, match="classifies nothing"):
        accuracy(nn.Linear(2, 2), folder, pixels)
    model = Reader(3)
    nn.init.constant_(model.scale, float("nan"))
    with pytest.raises(NumericalError, match="not finite"):
        accuracy(model, folder, pixels)


def test_speed_is_a_ratio() -> None:
    model = Reader(3)
    speed = compare_speed(model, model, (3, 8, 8), batch_size=4, repeats=3)
    assert 0.05 < speed.ratio < 20
    assert speed.dense > 0
    assert speed.batch_size == 4
    with pytest.raises(InvalidArgument, match="batch_size"):
        compare_speed(model, model, (3, 8, 8), batch_size=0)
    with pytest.raises(InvalidArgument, match="batch_size"):
        accuracy(model, "images", pixels, batch_size=0)


# -- transformers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    """A tiny ViT for 3 classes, with its processor."""
    return save_vit(tmp_path_factory.mktemp("vit"), classes=3)


def run(*arguments, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_the_commands(vit: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--images", folder, "--tokens", 96, "--steps", 1, "--pattern", "bitmap:16x16"]
    run("compress", vit, "--out", out, "--ratio", 0.9, "--base", "identity", *options)
    assert reads_images(out)
    assert not reads_images("demo:smollm2")
    model, transform = load_image_model(out)
    assert input_shape(transform) == (3, 32, 32)
    assert class_names(model) == ["a", "b", "c"]
    found = json.loads(run("eval", out, "--images", folder, "--json").stdout)
    assert found["images"] == 9
    assert found["top5"] == 1
    assert "top-1" in run("eval", vit, "--images", folder).stdout
    assert "images/s" in run("bench", out, "--dense", vit, "--batch-size", 2, "--repeats", 1).stdout


def test_the_commands_refuse(vit: Path, folder: Path, tmp_path: Path) -> None:
    compress = ["compress", vit, "--out", tmp_path / "out", "--ratio", 0.9]
    assert "give a causal language model" in run(*compress, "--calib", __file__, code=1).stderr
    assert "exclude each other" in run(*compress, "--images", folder, "--calib", __file__, code=2).stderr
    assert "belongs to timm:NAME" in run(*compress, "--weights", "w.pth", code=2).stderr
    assert "tokens found" in run(*compress, "--images", folder, "--base", "identity", code=1).stderr
    assert "give it" in run("bench", vit, code=2).stderr
    assert "exclude each other" in run("eval", vit, "--images", folder, "--text", __file__, code=2).stderr
    assert "belongs to timm:NAME" in run("eval", vit, "--weights", "w.pth", code=2).stderr
    with pytest.raises(InvalidArgument, match="predicts no tokens"):
        load_model(vit)


def test_a_processor_is_needed(vit: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((vit / name).read_bytes())
    with pytest.raises(InvalidArgument, match=r"has no preprocessor_config.json"):
        load_image_model(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="image processor does not load"):
        load_image_model(tmp_path)
