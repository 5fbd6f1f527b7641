"""What the quality benchmarks of encoders and classifiers share: options, cells, and what is written.

Language models have ``fips compare``.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from fips_ext.comparison import Cell, Results, Settings, methods_of, provenance, run_cells
from fips_ext.comparison.publish import RESULT_FILE, publish


def parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """Options of every quality benchmark; ``defaults`` override theirs."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--out", type=Path, required=True, help="folder of compare.json, .md and .png")
    found.add_argument("--ratios", type=float, nargs="+", default=[0.75, 0.6, 0.5, 0.4, 0.25])
    found.add_argument("--patterns", nargs="+", default=["bitmap", "block:32x32", "block:64x64"])
    found.add_argument("--methods", nargs="+", help="some of those in the table; default: all")
    found.add_argument("--tokens", type=int, default=32768, help="to calibrate on")
    found.add_argument("--group-size", type=int, default=3)
    found.add_argument("--steps", type=int, default=200)
    found.add_argument("--distill-steps", type=int, default=0)
    found.add_argument("--seed", type=int, default=0)
    found.set_defaults(**defaults)
    return found


def run(
    name: str,
    model: nn.Module,
    data: Iterable[Any],
    evaluate: Callable[[nn.Module], dict[str, dict[str, Any]]],
    arguments: argparse.Namespace,
    **setting: Any,
) -> None:
    """Measure every cell that ``--out`` does not hold, and write it, the tables and the plot.

    Args:
        data: to calibrate on, as long as it takes.
        evaluate: measures of a model, see :class:`fips_ext.comparison.Row`.
        setting: what numbers depend on beside the options.
    """
    common = {
        "calibration_tokens": arguments.tokens,
        "group_size": arguments.group_size,
        "steps": arguments.steps,
        "distill_steps": arguments.distill_steps,
        "seed": arguments.seed,
    }
    notes = provenance(shlex.join(["python", *sys.argv]))
    results = Results(arguments.out / RESULT_FILE, {"model": name, **setting}, notes)
    methods = [m for m in methods_of(arguments.patterns) if m.name in (arguments.methods or [m.name])]
    cells = [Cell(method, ratio) for ratio in arguments.ratios for method in methods]
    rows = run_cells(model, cells, data, Settings(common, evaluate), results, note=print)
    for table in publish(results, rows, arguments.out):
        print(table.to_markdown())


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(f"{name} is missing; the head of this benchmark says what to install")
    return Path(next(iter(spec.submodule_search_locations)))
