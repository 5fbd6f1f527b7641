"""``fips report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import DeviceOption, note, quiet_transformers, stdout

_PROMPTS = ("The capital of France is", "Water boils at", "The most important thing about compression is")


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder of fips.")],
    out: Annotated[
        Path | None,
        typer.Option(help="HTML file; a .md file is written beside it. Default: DIR/report.html."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue as a sample. More than once.")
    ] = None,
    measure: Annotated[bool, typer.Option(help="Time the first MLP, and write samples.")] = True,
    device: DeviceOption = "cpu",
) -> None:
    """One self-contained page about a checkpoint: sizes, errors, bases, blocks, latency, samples, recipe.

    Examples:

    - `fips report small`
    - `fips report small --out small.html --no-measure`
    """
    from .._atomic import replace_file
    from ..checkpoint import from_pretrained
    from ..models import check_device, load_tokenizer
    from ..nn.mlp import shared_mlps
    from ..report_page import collect, to_html, to_markdown
    from ..report_page.latency import measure as measure_latency
    from ..throughput import generate_text

    check_device(device)
    quiet_transformers()
    note(f"loading {directory}")
    model = from_pretrained(directory, device=device)
    tokenizer = load_tokenizer(directory)
    latency, samples = [], []
    if measure:
        note("measuring the first MLP")
        latency = measure_latency(next(iter(shared_mlps(model).values())))
        if tokenizer is not None:
            note("writing samples")
            samples = [(p, generate_text(model, tokenizer, p, 40)) for p in prompt or _PROMPTS]
    facts = collect(directory, model, latency=latency, samples=samples)
    page = directory / "report.html" if out is None else out
    for path, text in ((page, to_html(facts)), (page.with_suffix(".md"), to_markdown(facts))):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text)
        stdout().print(f"wrote {path}", soft_wrap=True)
