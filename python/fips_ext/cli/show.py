"""``fips info`` and ``fips generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..models import load_model
from ..throughput import generate_text
from .console import (
    DeviceOption,
    DTypeOption,
    JsonOption,
    note,
    print_json,
    quiet_transformers,
    stdout,
    torch_dtype,
)


def generate(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Model to use, usually a checkpoint.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 64,
    dtype: DTypeOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Continue a text greedily. Stdout holds the continuation only.

    Example:

    - `fips generate small "The capital of France is" --max-new-tokens 32`
    """
    quiet_transformers()
    note(f"loading {directory}")
    model, tokenizer = load_model(directory, torch_dtype(dtype), device)
    typer.echo(generate_text(model, tokenizer, prompt, max_new_tokens))


def info(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder of fips.")],
    as_json: JsonOption = False,
) -> None:
    """What a checkpoint holds: bytes per component, ratios to dense, and the recipe that made it.

    Example:

    - `fips info small --json`
    """
    from .. import checkpoint

    facts = checkpoint.info(directory)
    if as_json:
        print_json(facts)
        return
    table = Table("fact", "value", title=str(directory))
    for name, value in _flatten(facts):
        table.add_row(name, value)
    stdout().print(table)


def _flatten(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Rows of a nested dict, keys joined by dots."""
    rows: list[tuple[str, str]] = []
    for key, value in facts.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            rows.extend(_flatten(value, f"{name}."))
        elif isinstance(value, list):
            rows.append((name, f"{len(value)} entries, see --json"))
        elif isinstance(value, float):
            rows.append((name, f"{value:.4g}"))
        elif isinstance(value, int) and not isinstance(value, bool):
            rows.append((name, f"{value:,}"))
        else:
            rows.append((name, str(value)))
    return rows
