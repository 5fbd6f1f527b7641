"""Accuracy of an image classifier, and how many images it takes in a second."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InvalidArgument, NumericalError
from .integrations.images import Transform, class_names, labelled_images, read_image

BATCH = 32

_TOP = 5
_Z95 = 1.959964  # of the normal distribution: 95 % lie within so many deviations
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Shares of images whose class is the first, or among the first five, of the prediction.

    Attributes:
        top1, top5: in [0, 1].
        interval: of ``top1``, 95 %, by Wilson's score: how far the choice of the images may move it.
        images: how many were classified.
        classes: of the model.
    """

    top1: float
    top5: float
    interval: tuple[float, float]
    images: int
    classes: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@torch.inference_mode()
def accuracy(
    model: nn.Module,
    folder: str | Path,
    transform: Transform,
    batch_size: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Accuracy:
    """Classify every image of a folder that holds one folder for each class, in eval mode.

    Args:
        folder: see :func:`~.integrations.images.labelled_images`.
        transform: of an image to the input of the model.
        progress: called with (images done, images).

    Raises:
        InvalidArgument: the model is no classifier, or the folder tells no labels.
        NumericalError: a prediction is NaN or Inf.
    """
    if batch_size < 1:
        raise InvalidArgument(f"batch_size: got {batch_size}; expected at least 1")
    names = class_names(model)
    images = labelled_images(folder, names)
    parameter = next(model.parameters())
    was_training = model.training
    model.eval()
    right = torch.zeros(2, dtype=torch.int64)
    try:
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            pixels = torch.stack([transform(read_image(path)) for path, _ in part])
            logits = _logits(model(pixels.to(parameter.device, parameter.dtype)))
            if not bool(logits.isfinite().all()):
                raise NumericalError(
                    f"model: its prediction for {part[0][0]} or one of the {len(part) - 1} after it is not "
                    "finite; load it in float32 or look for NaN in its weights"
                )
            best = logits.topk(min(_TOP, logits.shape[1])).indices.cpu()
            hits = best == torch.tensor([label for _, label in part])[:, None]
            right += torch.stack([hits[:, 0].sum(), hits.any(1).sum()])
            if progress is not None:
                progress(start + len(part), len(images))
    finally:
        model.train(was_training)
    top1, top5 = (right.double() / len(images)).tolist()
    return Accuracy(top1, top5, _wilson(top1, len(images)), len(images), len(names))


@dataclasses.dataclass(frozen=True)
class ImageSpeed:
    """Two models timed in turns on the same images.

    Attributes:
        dense, compressed: medians, in images per second.
        ratio: compressed over dense, the median over pairs of neighbouring runs.
        batch_size: images at a time.
    """

    dense: float
    compressed: float
    ratio: float
    batch_size: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def compare_speed(
    dense: nn.Module, compressed: nn.Module, shape: tuple[int, ...], batch_size: int, repeats: int = 5
) -> ImageSpeed:
    """Images per second of two models of one device and dtype, after one run each that does not count.

    Args:
        shape: of an image, ``[channels, height, width]``.
    """
    if batch_size < 1 or repeats < 1:
        raise InvalidArgument(f"batch_size, repeats: got {batch_size}, {repeats}; expected at least 1")
    generator = torch.Generator().manual_seed(_SEED)
    pixels = torch.randn(batch_size, *shape, generator=generator).to(next(dense.parameters()))
    pairs = [(_seconds(dense, pixels), _seconds(compressed, pixels)) for _ in range(repeats + 1)][1:]
    return ImageSpeed(
        dense=batch_size / statistics.median(first for first, _ in pairs),
        compressed=batch_size / statistics.median(second for _, second in pairs),
        ratio=statistics.median(first / second for first, second in pairs),
        batch_size=batch_size,
    )


@torch.inference_mode()
def _seconds(model: nn.Module, pixels: Tensor) -> float:
    if pixels.is_cuda:
        torch.cuda.synchronize(pixels.device)
    start = time.perf_counter()
    model(pixels)
    if pixels.is_cuda:
        torch.cuda.synchronize(pixels.device)
    return time.perf_counter() - start


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise InvalidArgument("model: its output holds no logits [images, classes]; give a classifier")
    return logits.float()


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson 1927, "Probable inference, the law of succession, and statistical inference"."""
    z2 = _Z95**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = _Z95 / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)
