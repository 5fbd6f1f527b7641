"""``fips eval`` and ``fips bench``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from ..evaluate import CONTEXT, QUICK_WINDOWS, Perplexity, perplexity
from ..integrations.text import held_out_text, token_windows
from ..models import check_device, load_model
from ..throughput import Comparison, Throughput, Workload, compare, measure
from .console import (
    DeviceOption,
    DTypeOption,
    JsonOption,
    TextOption,
    note,
    print_json,
    progress_bar,
    quiet_transformers,
    stdout,
    torch_dtype,
)


def evaluate(
    model: Annotated[str, typer.Argument(metavar="DIR|MODEL", help="What to score.")],
    text: TextOption = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = CONTEXT,
    windows: Annotated[
        int, typer.Option(min=0, help="Score the first N windows; 0 scores the whole text.")
    ] = QUICK_WINDOWS,
    dtype: DTypeOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Perplexity on a text: windows without overlap, all tokens but the first of each window scored.

    The interval is a 95 % bootstrap over windows. Compare two models on the same text, context and
    windows only.

    Examples:

    - `fips eval small`
    - `fips eval demo:smollm2 --text my.txt --context 1024 --windows 0 --json`
    """
    check_device(device)
    content = held_out_text(text)
    quiet_transformers()
    note(f"loading {model}")
    loaded, tokenizer = load_model(model, torch_dtype(dtype), device)
    ids = token_windows(content, tokenizer, context, windows or None)
    with progress_bar("scoring windows") as progress:
        result = perplexity(loaded, ids, progress)
    if as_json:
        print_json({"model": model, **result.to_dict()})
    else:
        stdout().print(_perplexity_table(model, result))


def bench(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Model to time, usually a checkpoint.")],
    dense: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Time this model in turns with it and print the ratio."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt (prefill).")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded one by one.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs; the median counts.")] = 5,
    dtype: DTypeOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Decode and prefill tokens per second, at batch 1 with a KV cache.

    With --dense both models run in alternation and the dense one takes the dtype of the other, so that the
    ratio is about the compression and nothing else.

    Examples:

    - `fips bench small`
    - `fips bench small --dense demo:smollm2 --json`
    """
    workload = Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats)
    quiet_transformers()
    note(f"loading {directory}")
    model, _ = load_model(directory, torch_dtype(dtype), device)
    if dense is None:
        alone = measure(model, workload)
        if as_json:
            print_json({"model": directory, **alone.to_dict()})
        else:
            stdout().print(_throughput_table({directory: alone}))
        return
    note(f"loading {dense}")
    reference, _ = load_model(dense, next(model.parameters()).dtype, device)
    pair = compare(reference, model, workload)
    if as_json:
        print_json({"model": directory, "dense_model": dense, **pair.to_dict()})
    else:
        stdout().print(_throughput_table({dense: pair.dense, directory: pair.compressed}, pair))


def _perplexity_table(model: str, result: Perplexity) -> Table:
    table = Table("model", "perplexity", "95 % interval", "tokens", "windows × context")
    low, high = result.interval
    table.add_row(
        model,
        f"{result.perplexity:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{result.tokens:,}",
        f"{result.windows} × {result.context}",
    )
    return table


def _throughput_table(models: dict[str, Throughput], pair: Comparison | None = None) -> Table:
    table = Table("model", "decode tokens/s", "prefill tokens/s")
    for name, speed in models.items():
        table.add_row(name, f"{speed.decode:.1f}", f"{speed.prefill:.1f}")
    if pair is not None:
        table.add_section()
        table.add_row("compressed / dense", f"{pair.decode_ratio:.2f} ×", f"{pair.prefill_ratio:.2f} ×")
    return table
