"""The quality benchmarks: their options, files and readers, on models that take seconds."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import quality_common
import quality_fashion_mnist as fashion
import torch

from ..tiny_models import build

pytestmark = pytest.mark.usefixtures("single_thread")


def test_writes_results_table_and_plot(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = build("vit")
    with torch.no_grad():
        expected = model(x).logits

    def evaluate(compressed) -> dict:
        with torch.no_grad():
            error = float((compressed(x).logits - expected).square().mean())
        return {"x": {"name": "error", "value": error, "relative": False}}

    options = quality_common.parser("about", patterns=["bitmap:16x16"])
    line = f"--out {tmp_path} --tokens 96 --steps 2 --ratios 0.8 --methods fips:bitmap:16x16 low-rank"
    arguments = options.parse_args(line.split())
    quality_common.run("tiny", model, [x] * 20, evaluate, arguments, size=32)
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["setting"] == {"model": "tiny", "size": 32}
    assert [row["method"] for row in written["rows"]] == ["fips:bitmap:16x16", "low-rank"]
    assert written["dense"]["x"]["value"] == 0
    assert "fips:bitmap:16x16" in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "compare.png").stat().st_size > 1000


def test_reads_idx_files(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
    labels = torch.tensor([1, 9, 0], dtype=torch.uint8)
    header = b"\0\0\x08"
    sizes = b"".join(size.to_bytes(4, "big") for size in images.shape)
    raw = header + b"\x03" + sizes + images.numpy().tobytes()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(raw))
    raw = header + b"\x01" + (3).to_bytes(4, "big") + labels.numpy().tobytes()
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(raw))
    pixels, classes = fashion.load(tmp_path, "t10k")
    assert pixels.shape == (3, 1, 28, 28)
    torch.testing.assert_close(pixels[:, 0] * fashion.DEVIATION + fashion.MEAN, images / 255)
    assert torch.equal(classes, labels.long())
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x0d\x01" + b"\0" * 4))
    with pytest.raises(ValueError, match="no IDX file of bytes"):
        fashion.load(tmp_path, "t10k")
