"""``fips compare``."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from torch import nn

from .. import __version__
from ..errors import InvalidArgument
from ..evaluate import CONTEXT, QUICK_WINDOWS, perplexity
from ..integrations.text import calibration_text, calibration_windows, held_out_text, token_windows
from ..models import check_device, load_model
from ..recipe import Recipe
from ..throughput import Workload, compare
from .console import (
    DeviceOption,
    DType,
    JsonOption,
    note,
    print_json,
    progress_bar,
    quiet_transformers,
    stdout,
    torch_dtype,
)

HELD_OUT = "held-out Wikipedia"


@dataclasses.dataclass(frozen=True)
class _Effort:
    """What ``--quick`` decides where the user does not."""

    tokens: int
    steps: int
    tokens_per_step: int
    distill_steps: int
    windows: int
    workload: Workload


_QUICK = _Effort(32768, 6, 512, 0, QUICK_WINDOWS, Workload(prompt_tokens=128, new_tokens=12, repeats=2))
_FULL = _Effort(65536, 100, 1024, 200, 0, Workload(prompt_tokens=128, new_tokens=48, repeats=5))


def compare_methods(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What to compress; see 'fips --help'.")],
    ratios: Annotated[str, typer.Option(help="MLP bytes to keep, comma-separated.")] = "0.75,0.6,0.5",
    patterns: Annotated[
        str, typer.Option(help="Patterns of the factors, comma-separated.")
    ] = "bitmap,block:32x32",
    methods: Annotated[
        str | None, typer.Option(help="Some of the methods, comma-separated, by the names in the table.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Little text, 6 training steps, scored after the last: shows the order, not the best.",
        ),
    ] = False,
    out: Annotated[
        Path,
        typer.Option(help="Folder for results, table and plot; what it holds is not measured again."),
    ] = Path("compare-out"),
    calib: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text to calibrate on. Default: the Wikipedia extract of the gensim package."
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text file to score, more than once for several. Default: a part of the "
            "Wikipedia extract that does not calibrate."
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Calibration tokens.")] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Training steps per group.")] = None,
    distill_steps: Annotated[int | None, typer.Option(min=0, help="Steps of the last stage.")] = None,
    windows: Annotated[
        int | None, typer.Option(min=0, help="Score the first N windows of each text; 0 scores all.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated; every cell is measured with each.")] = "0",
    bits: Annotated[
        int | None,
        typer.Option(help="Store all factors as codes of 8 or 4 bits. Default: in the dtype of the model."),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Of the weights and of the bytes.")] = DType.bfloat16,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Compare FiPS with pruning and low rank: equal bytes, equal data, equal training.

    Every method is a recipe of the same code and works from one calibration. Perplexity is relative to the
    dense model, in the closed form and after every training stage (`--quick`: after the last); speed is
    measured in turns with the dense model. Interrupted, the same command goes on where it stopped.

    Examples:

    - `fips compare demo:smollm2 --ratios 0.75,0.6,0.5 --quick`
    - `fips compare ./my-llama --ratios 0.6 --methods fips:bitmap,wanda:bitmap --text my.txt --out mine`
    """
    effort = _QUICK if quick else _FULL
    common = {
        "calibration_tokens": effort.tokens if tokens is None else tokens,
        "steps": effort.steps if steps is None else steps,
        "tokens_per_step": effort.tokens_per_step,
        "distill_steps": effort.distill_steps if distill_steps is None else distill_steps,
        "bits": bits,
    }
    limit = effort.windows if windows is None else windows
    wanted, seed_list = _chosen_methods(patterns, methods), _numbers("--seeds", seeds, int)
    # Everything that can refuse does so before the minutes of work.
    try:
        ratio_list = _numbers("--ratios", ratios, float)
        for ratio, seed in itertools.product(ratio_list, seed_list):
            Recipe(ratio=ratio, seed=seed, bits=bits)
    except InvalidArgument as error:
        raise typer.BadParameter(str(error)) from error
    check_device(device)
    _check_plot()
    from ..comparison import Cell, Results, Settings, provenance, run_cells
    from ..comparison.publish import PLOT_FILE, RESULT_FILE, TABLE_FILE, publish
    from ..train import batches_for

    cells = [Cell(method, ratio) for ratio in ratio_list for method in wanted]
    content = calibration_text(calib)
    scored = {path.name: held_out_text(path) for path in text} if text else {HELD_OUT: held_out_text()}
    if text and len(scored) < len(text):
        raise InvalidArgument(f"--text: got two files named alike, {text}; the table names them by file name")
    quiet_transformers()
    note(f"loading {model}")
    dense, tokenizer = load_model(model, torch_dtype(dtype), device)
    ids = {name: token_windows(t, tokenizer, CONTEXT, limit or None) for name, t in scored.items()}
    setting = {
        "fips_ext": __version__,
        "model": model,
        "dtype": dtype.value,
        "calibration_text": _digest(content),
        "texts": {name: {"text": _digest(scored[name]), "windows": list(w.shape)} for name, w in ids.items()},
    }
    results = Results(out / RESULT_FILE, setting, provenance(shlex.join(["fips", *sys.argv[1:]])))

    def quality(scored_model: nn.Module) -> dict[str, Any]:
        found = {name: perplexity(scored_model, w).to_dict() for name, w in ids.items()}
        return {
            name: {"name": "perplexity", "value": fields["perplexity"], "relative": True, **fields}
            for name, fields in found.items()
        }

    def speed(first: nn.Module, second: nn.Module) -> dict[str, Any]:
        return compare(first, second, effort.workload).to_dict()

    kept = batches_for(common["distill_steps"])
    data = calibration_windows(content, tokenizer, common["calibration_tokens"], kept)
    rows = []
    for seed in seed_list:
        settings = Settings({**common, "seed": seed}, quality, speed, every_stage=not quick)
        rows += run_cells(dense, cells, data, settings, results, note=note, progress_bar=progress_bar)
    tables = publish(results, rows, out)
    if as_json:
        print_json({"dense": results.dense, "rows": [dataclasses.asdict(row) for row in rows]})
        return
    for table in tables:
        print_whole(rich_table(table))
    stdout().print(f"wrote {RESULT_FILE}, {TABLE_FILE} and {PLOT_FILE} to {out}", soft_wrap=True)


def _digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        numbers = [kind(part) for part in _split(text)]
    except ValueError as error:
        raise typer.BadParameter(f"{option}: got {text!r}; expected comma-separated numbers") from error
    if not numbers:
        raise typer.BadParameter(f"{option}: got {text!r}; expected at least one number")
    return numbers


def _chosen_methods(patterns: str, names: str | None) -> list[Any]:
    from ..comparison import methods_of

    try:
        methods = methods_of(_split(patterns))
    except InvalidArgument as error:
        raise typer.BadParameter(str(error)) from error
    if names is None:
        return methods
    known = {method.name: method for method in methods}
    unknown = [name for name in _split(names) if name not in known]
    if unknown or not _split(names):
        raise typer.BadParameter(
            f"--methods: got {names!r}; with these patterns there are {', '.join(known)}"
        )
    return [known[name] for name in _split(names)]


def _check_plot() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the plot needs matplotlib; pip install 'fips_ext[plot]'")


def rich_table(table: Any) -> Table:
    shown = Table(title=table.title, box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for name, column in zip(table.header, zip(*table.rows, strict=True), strict=True):
        # Within 80 columns, if they suffice: headers break, numbers and names must not.
        shown.add_column(name.replace(" ", "\n"), min_width=max(map(len, column)))
    for number, cells in enumerate(table.rows):
        if number in table.sections:
            shown.add_section()
        shown.add_row(*cells)
    return shown


def print_whole(table: Table) -> None:
    """Wider than the terminal, if it must be: lines that wrap are worth more than numbers cut off."""
    console = stdout()
    needed = console.measure(table, options=console.options.update(max_width=1000)).minimum
    console.width = max(console.width, needed)
    console.print(table)
