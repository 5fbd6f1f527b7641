"""Where the commands write: results to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..models import DTYPES

DType = Enum("DType", {name: name for name in DTYPES}, type=str)

DeviceOption = Annotated[str, typer.Option(help="Where to compute: cpu, cuda or cuda:N.")]
DTypeOption = Annotated[
    DType | None,
    typer.Option(help="Load the weights in this dtype. Default: that of the file (float32 for GGUF)."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")]
TextOption = Annotated[
    Path | None,
    typer.Option(help="UTF-8 text file. Default: the Wikipedia extract of the gensim package."),
]

ImagesOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of images, for a model that sees.")
]
WeightsOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Weights of timm:NAME, .safetensors or .pth.")
]


def stdout() -> Console:
    return Console()


def stderr() -> Console:
    return Console(stderr=True)


def fail(error: Exception) -> None:
    """One red line on stderr."""
    message = " ".join(str(error).split()) or type(error).__name__
    stderr().print(Text(f"error: {message}", style="red"), soft_wrap=True)


def note(message: str) -> None:
    """One dim line on stderr."""
    stderr().print(Text(message, style="dim"), soft_wrap=True)


def print_json(result: dict[str, Any]) -> None:
    # NaN and Infinity are not JSON: better an error here than a file that other programs reject.
    typer.echo(json.dumps(result, indent=2, allow_nan=False))


def size(text: str) -> int:
    """Bytes, as in ``6GiB``, ``6G`` or ``500MiB``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None or not (
        found := int(float(match[1]) * 2 ** (10 * " KMGT".index(match[2].upper() or " ")))
    ):
        raise typer.BadParameter(f"got {text!r}; expected a size such as 6GiB or 500MiB")
    return found


def torch_dtype(choice: Enum | None) -> torch.dtype | None:
    return None if choice is None else DTYPES[choice.value]


def quiet_transformers() -> None:
    """Silence the bars and advice of transformers, if it is there; our own progress says what goes on."""
    try:
        from transformers.utils import logging
    except ModuleNotFoundError:
        return

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Progress on stderr, moved by calling the result with (done, total).

    A bar on a terminal. In a log, which would keep every redrawing, one line for each tenth.
    """
    console = stderr()
    if not console.is_terminal:
        yield _tenths(description)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _tenths(description: str) -> Callable[[int, int], None]:
    start, reported = time.monotonic(), 0

    def move(done: int, total: int) -> None:
        nonlocal reported
        tenth = 10 * done // max(1, total)
        if tenth > reported:
            reported = tenth
            note(f"{description}: {10 * tenth} % after {time.monotonic() - start:.0f} s")

    return move
