"""``fips eval`` and ``fips bench``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..classification import BATCH, Accuracy, ImageSpeed, accuracy, compare_speed
from ..evaluate import CONTEXT, QUICK_WINDOWS, Perplexity, perplexity
from ..integrations.images import input_shape
from ..integrations.text import held_out_text, token_windows
from ..models import TIMM, check_device, load_image_model, load_model, reads_images
from ..throughput import Comparison, Throughput, Workload, compare, measure
from .console import (
    DeviceOption,
    DTypeOption,
    ImagesOption,
    JsonOption,
    TextOption,
    WeightsOption,
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
    images: ImagesOption = None,
    weights: WeightsOption = None,
    dtype: DTypeOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Perplexity on a text, or (--images) how many images of a labelled folder are classified right.

    Text is cut into windows without overlap, all tokens but the first of each are scored; the interval is a
    95 % bootstrap over windows. Compare two models on the same text, context and windows only.

    Images of a class lie in a folder named by its number or its label, or the folders in sorted order are the
    classes, as in ImageNet's. The interval is Wilson's, 95 %.

    Examples:

    - `fips eval small`
    - `fips eval demo:smollm2 --text my.txt --context 1024 --windows 0 --json`
    - `fips eval small-vit --images imagenet/val`
    """
    check_device(device)
    if images is None and weights is not None:
        raise typer.BadParameter("--weights: belongs to timm:NAME with --images")
    if images is not None and text is not None:
        raise typer.BadParameter("--text: it and --images exclude each other; give one")
    if images is not None:
        quiet_transformers()
        note(f"loading {model}")
        classifier, transform = load_image_model(model, weights, torch_dtype(dtype), device)
        with progress_bar("classifying images") as progress:
            found = accuracy(classifier, images, transform, progress=progress)
        if as_json:
            print_json({"model": model, **found.to_dict()})
        else:
            stdout().print(_accuracy_table(model, found))
        return
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
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time, for a model that sees.")] = BATCH,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs; the median counts.")] = 5,
    weights: WeightsOption = None,
    dtype: DTypeOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Decode and prefill tokens per second, at batch 1 with a KV cache; images per second of one that sees.

    With --dense both models run in alternation and the dense one takes the dtype of the other, so that the
    ratio is about the compression and nothing else.

    Examples:

    - `fips bench small`
    - `fips bench small --dense demo:smollm2 --json`
    - `fips bench small-vit --dense timm:deit_small_patch16_224 --weights deit.pth`
    """
    if reads_images(directory):
        _bench_images(directory, dense, weights, batch_size, repeats, dtype, device, as_json)
        return
    if weights is not None:
        raise typer.BadParameter("--weights: belongs to timm:NAME, and this is a language model")
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


def _bench_images(
    directory: str,
    dense: str | None,
    weights: Path | None,
    batch_size: int,
    repeats: int,
    dtype: Enum | None,
    device: str,
    as_json: bool,
) -> None:
    if dense is None:
        raise typer.BadParameter("--dense: a model that sees is timed in turns with a dense one; give it")
    quiet_transformers()
    note(f"loading {directory}")
    model, transform = load_image_model(
        directory, _weights_of(directory, weights), torch_dtype(dtype), device
    )
    note(f"loading {dense}")
    kind = next(model.parameters()).dtype
    reference, _ = load_image_model(dense, _weights_of(dense, weights), kind, device)
    speed = compare_speed(reference, model, input_shape(transform), batch_size, repeats)
    if as_json:
        print_json({"model": directory, "dense_model": dense, **speed.to_dict()})
    else:
        stdout().print(_speed_table(dense, directory, speed))


def _weights_of(model: str, weights: Path | None) -> Path | None:
    return weights if model.startswith(TIMM) else None


def _accuracy_table(model: str, found: Accuracy) -> Table:
    table = Table("model", "top-1 %", "95 % interval", "top-5 %", "images", "classes")
    low, high = found.interval
    table.add_row(
        model,
        f"{100 * found.top1:.2f}",
        f"{100 * low:.2f} to {100 * high:.2f}",
        f"{100 * found.top5:.2f}",
        f"{found.images:,}",
        f"{found.classes:,}",
    )
    return table


def _speed_table(dense: str, compressed: str, speed: ImageSpeed) -> Table:
    table = Table("model", f"images/s, {speed.batch_size} at a time")
    table.add_row(dense, f"{speed.dense:.1f}")
    table.add_row(compressed, f"{speed.compressed:.1f}")
    table.add_section()
    table.add_row("compressed / dense", f"{speed.ratio:.2f} ×")
    return table


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
