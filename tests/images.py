"""Small image files in folders by class, and a small model that reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from .tiny_models import vision_transformer

SIZE = 40


def save_images(folder: Path, classes: dict[str, int], seed: int = 0) -> Path:
    """Noise of ``SIZE`` by ``SIZE + 8`` pixels: as many files in each folder as ``classes`` says."""
    random = np.random.default_rng(seed)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = random.integers(0, 256, (SIZE, SIZE + 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def save_vit(folder: Path, classes: int) -> Path:
    """A tiny ViT for the classes a, b, …, with its processor, as transformers saves them."""
    id2label = {number: chr(ord("a") + number) for number in range(classes)}
    model = vision_transformer("ViT", "ForImageClassification", id2label=id2label, initializer_range=0.2)
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_resize": True,
        "do_normalize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "resample": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
