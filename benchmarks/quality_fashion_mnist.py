"""Top-1 of a small ViT on Fashion-MNIST, compressed by every method at equal bytes.

    apt-get install dataset-fashion-mnist
    python benchmarks/quality_fashion_mnist.py --out benchmarks/results/quality/fashion-mnist

The classifier is trained here, from scratch, and kept in ``--cache`` for the next run. Compression sees
training images without labels; all 10,000 test images are scored.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from quality_common import parser, run
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

DATA = Path("/usr/share/datasets/fashion-mnist")
MEAN, DEVIATION = 0.2860, 0.3530  # of the training images
BATCH = 128
PEAK_RATE, WEIGHT_DECAY, WARM_UP = 1e-3, 0.05, 0.1
MODEL = {
    "image_size": 28,
    "patch_size": 7,
    "num_channels": 1,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_labels": 10,
}


def read_idx(path: Path) -> Tensor:
    """An array in the IDX format: two zero bytes, type, dimensions, sizes (big-endian), bytes."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of bytes")
    sizes = np.frombuffer(raw, ">u4", raw[3], 4).astype(int)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes).copy())


def load(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Normalised images ``[N, 1, 28, 28]`` and labels ``[N]``."""
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz").float().div(255).sub(MEAN).div(DEVIATION)
    return images.unsqueeze(1), read_idx(folder / f"{part}-labels-idx1-ubyte.gz").long()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random flips, and shifts by up to 2 pixels."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    dx, dy = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return images.roll((dx, dy), (2, 3))


def train(images: Tensor, labels: Tensor, epochs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = ViTForImageClassification(ViTConfig(**MODEL, hidden_dropout_prob=0.1))
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, steps, pct_start=WARM_UP)
    start = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for rows in order.split(BATCH)[: len(images) // BATCH]:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(augment(images[rows], generator)).logits
            loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval()


@torch.inference_mode()
def error_rate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Per cent of the images that are not classified right."""
    found = torch.cat([model(batch).logits.argmax(1) for batch in images.split(500)])
    return 100 * float((found != labels).double().mean())


def batches(images: Tensor, seed: int) -> Iterator[Tensor]:
    """Training images in random order, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(images), generator=generator).split(64):
            yield images[rows]


def main() -> None:
    options = parser(
        __doc__,
        patterns=["bitmap:32x64", "block:32x32", "block:16x16"],
        group_size=3,
    )
    options.add_argument("--data", type=Path, default=DATA)
    options.add_argument("--cache", type=Path, default=Path("fashion-mnist-vit.pt"))
    options.add_argument("--epochs", type=int, default=12)
    arguments = options.parse_args()
    images, labels = load(arguments.data, "train")
    test = load(arguments.data, "t10k")
    if arguments.cache.exists():
        model = ViTForImageClassification(ViTConfig(**MODEL))
        model.load_state_dict(torch.load(arguments.cache, weights_only=True))
        model.eval()
    else:
        model = train(images, labels, arguments.epochs, arguments.seed)
        torch.save(model.state_dict(), arguments.cache)

    def evaluate(compressed: nn.Module) -> dict[str, dict[str, Any]]:
        value = error_rate(compressed, *test)
        return {"test images": {"name": "top-1 error in %", "value": value, "relative": False}}

    name = "ViT on Fashion-MNIST"
    run(name, model, batches(images, arguments.seed), evaluate, arguments, epochs=arguments.epochs)


if __name__ == "__main__":
    main()
