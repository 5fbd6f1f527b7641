"""Image folders: what calibrates, and what is classified with labels by the names of its folders."""

from __future__ import annotations

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

    A folder's name is the number of a class or one of ``names``. Where they are neither, but as many as the
    classes, their sorted order counts, as in an ImageNet-style folder.

    Args:
        names: of the classes of the model, in its order.

    Raises:
        InvalidArgument: there is no such folder, or which class one is of cannot be told.
    """
    root = Path(folder)
    files = image_files(root)
    if loose := [path for path in files if path.parent == root]:
        raise InvalidArgument(f"images: {loose[0]} has no label; put the images of each class in a folder")
    folders = sorted({path.relative_to(root).parts[0] for path in files})
    numbers = {name: number for number, name in enumerate(names)}
    if all(name in numbers for name in folders):
        classes = {name: numbers[name] for name in folders}
    elif all(name.isdecimal() and int(name) < len(names) for name in folders):
        classes = {name: int(name) for name in folders}
    elif len(folders) == len(names):
        classes = {name: number for number, name in enumerate(folders)}
    else:
        raise InvalidArgument(
            f"images: {root} holds {len(folders)} folders ({', '.join(folders[:3])}, …), the model knows "
            f"{len(names)} classes, and the names do not tell which is which; name them by the number of the "
            "class, or give a folder for each class"
        )
    return [(path, classes[path.relative_to(root).parts[0]]) for path in files]


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
