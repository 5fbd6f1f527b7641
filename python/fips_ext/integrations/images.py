"""Image folders: what calibrates, and what is classified with labels by the names of its folders."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InvalidArgument

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], Tensor]
"""An RGB image to a tensor ``[channels, height, width]``."""

CALIBRATION_BATCH = 8
_ANY_SIZE = (320, 240)
_WORDNET_ID = re.compile(r"n\d{8}")


class ProcessorTransform:
    """The image processor of a transformers model as a function of one image."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image) -> Tensor:
        return self.processor(image, return_tensors="pt")["pixel_values"][0]

    def save_pretrained(self, folder: str | Path) -> None:
        self.processor.save_pretrained(folder)


def input_shape(transform: Transform) -> tuple[int, ...]:
    """``(channels, height, width)`` that a transform makes of an image."""
    from PIL import Image

    return tuple(transform(Image.new("RGB", _ANY_SIZE)).shape)


def image_files(folder: str | Path) -> list[Path]:
    """Every image below ``folder`` by its suffix, in the order of their paths.

    Raises:
        InvalidArgument: it is no folder, or holds none.
    """
    from PIL import Image

    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidArgument(f"images: {folder} is not a folder; give one that holds image files")
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not found:
        raise InvalidArgument(f"images: {folder} holds no image file (.jpg, .png, .webp and the like)")
    return found


def read_image(path: Path) -> Image:
    """An image file in RGB.

    Raises:
        InvalidArgument: it is damaged, or far larger than any photograph.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidArgument(f"images: {path} cannot be read ({error}); remove or replace it") from error


def calibration_images(
    folder: str | Path, transform: Transform, dtype: torch.dtype, seed: int = 0
) -> Iterator[Tensor]:
    """Batches ``[B, channels, height, width]`` of all images below ``folder``, in random order.

    Labels are not looked at. A last, smaller batch is kept; a single image is a batch, too.
    """
    paths = image_files(folder)
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, len(paths), CALIBRATION_BATCH):
        rows = order[start : start + CALIBRATION_BATCH]
        yield torch.stack([transform(read_image(paths[row])).to(dtype) for row in rows])


def labelled_images(folder: str | Path, names: list[str]) -> list[tuple[Path, int]]:
    """Image files and the numbers of their classes, which the folders right below ``folder`` tell.

    A folder is called like one of ``names``, or by the number of a class. Where the model knows no names of
    its classes, or the folders are WordNet ids as ImageNet's, their sorted order counts if they are as many.

    Args:
        names: of the classes of the model, in its order; numbers, or ``LABEL_i``, where it knows none.

    Raises:
        InvalidArgument: there is no such folder, or which class one is of cannot be told.
    """
    root = Path(folder)
    files = image_files(root)
    if loose := [path for path in files if path.parent == root]:
        raise InvalidArgument(f"images: {loose[0]} has no label; put the images of each class in a folder")
    folders = sorted({path.relative_to(root).parts[0] for path in files})
    classes = _classes_of(folders, names)
    if classes is None:
        stray = next((name for name in folders if name not in names), folders[0])
        known = f", such as {names[0]!r}" if _are_names(names) else ""
        raise InvalidArgument(
            f"images: which class {root / stray} is of cannot be told; the {len(folders)} folders must be "
            f"called by the numbers (from 0) or the names of the model's {len(names)} classes{known}"
        )
    return [(path, classes[path.relative_to(root).parts[0]]) for path in files]


def _classes_of(folders: list[str], names: list[str]) -> dict[str, int] | None:
    """The class of each folder; None if they do not all say it without doubt."""
    if _are_names(names) and all(names.count(name) == 1 for name in folders):
        return {name: names.index(name) for name in folders}
    if all(name.isdecimal() for name in folders):
        return {name: int(name) for name in folders} if max(map(int, folders)) < len(names) else None
    in_order = not _are_names(names) or all(map(_WORDNET_ID.fullmatch, folders))
    if in_order and len(folders) == len(names):
        return {name: number for number, name in enumerate(folders)}
    return None


def _are_names(names: list[str]) -> bool:
    """Whether they say more than their place."""
    return not all(name in (str(i), f"LABEL_{i}") for i, name in enumerate(names))


def class_names(model: nn.Module) -> list[str]:
    """Of a classifier's outputs, in their order; the numbers of classes whose names are not known.

    Raises:
        InvalidArgument: it classifies nothing.
    """
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if labels and type(model).__name__.endswith("ForImageClassification"):
        return [str(labels[number]) for number in sorted(labels, key=int)]
    count = getattr(model, "num_classes", 0)
    if not isinstance(count, int) or count < 1:
        raise InvalidArgument(
            f"model: {type(model).__name__} classifies nothing; give a classifier, such as one of timm or an "
            "…ForImageClassification of transformers"
        )
    from .timm import is_timm, label_names

    return (label_names(model) if is_timm(model) else None) or [str(number) for number in range(count)]
