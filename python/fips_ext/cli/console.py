"""Where the commands write: results to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
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


def torch_dtype(choice: Enum | None) -> torch.dtype | None:
    return None if choice is None else DTYPES[choice.value]


def quiet_transformers() -> None:
    """Silence the bars and advice of transformers; our own progress says what is going on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, moved by calling the result with (done, total); nothing if stderr is no terminal."""
    console = stderr()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)

        def move(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield move
