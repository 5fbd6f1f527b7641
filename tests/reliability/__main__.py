"""Runs what docs/reliability.md promises and prints a table of counts and figures: `make reliability`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fips_ext._atomic import replace_file

ROOT = Path(__file__).parents[2]
RECIPES = {
    "bitmap": (),
    "blocks": ("--pattern", "block:16x16", "--base", "both", "--ratio", "0.95"),
    "codes, distilled": ("--bits", "4", "--distill-steps", "2"),
}


def run(*arguments: str, threads: int = 1) -> str:
    """The output of a Python program in a process of its own."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), TRANSFORMERS_VERBOSITY="error")
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(arguments)}: {done.stderr[-3000:]}")
    return done.stdout


def kills(folder: Path) -> dict[str, object]:
    total = {"kills": 0, "checkpoints": 0}
    for name, options in RECIPES.items():
        place = folder / name.replace(" ", "-")
        place.mkdir()
        found = json.loads(run("-m", "tests.reliability.killing", str(place), "--random", "20", *options))
        total = {key: total[key] + found[key] for key in total}
    assert total["kills"] >= 50
    return {"SIGKILLs": total["kills"], "checkpoints, all bit-identical": total["checkpoints"]}


def full_disks(folder: Path) -> dict[str, object]:
    return json.loads(run("-m", "tests.reliability.full_disk", str(folder)))


def hostile_files(folder: Path) -> dict[str, object]:
    from ..fuzz.hostile import HostileCheckpoint, mutations

    checkpoint = HostileCheckpoint(folder)
    corpus = sorted((ROOT / "tests/fuzz/corpus/checkpoint").iterdir())
    for path in corpus:
        checkpoint.read(path.read_bytes())
    for data in mutations(checkpoint.seeds(), 20_000, seed=1):
        checkpoint.read(data)
    return {"corpus files": len(corpus), "refused": checkpoint.refused, "loaded and run": checkpoint.accepted}


def processes(folder: Path) -> dict[str, object]:
    from .. import test_distributed as distributed

    distributed.save_tiny_llama(folder / "model")
    distributed.save_text(folder / "text.txt")
    worst = 0.0
    for number, (name, options) in enumerate(RECIPES.items()):
        for count in (1, 2):
            done = distributed.compress(folder, count, f"{number}-{count}", "--group-size", "2", *options)
            assert done.returncode == 0, f"{name}: {done.stderr}"
        pair = [folder / f"{number}-{count}" for count in (1, 2)]
        distributed.assert_equal_but_for_rounding(*pair)
        worst = max(worst, distributed.largest_difference(*pair))
    return {"recipes": len(RECIPES), "largest difference, of the RMS of its tensor": f"{worst:.1e}"}


def memory(folder: Path) -> dict[str, object]:
    options = ["--ratio", "0.6", "--steps", "2", "--tokens", "2048", "--group-size", "2"]
    options += ["--base", "shared", "--rank", "512", "--pattern", "block:64x64"]
    sizes = ["--width", "1024", "--hidden", "3584", "--depths", "6,32", "--limit", "0.8GiB"]
    threads = torch.get_num_threads()
    lines = run("-m", "tests.reliability.bounded", str(folder), *sizes, *options, threads=threads)
    found = [json.loads(line) for line in lines.splitlines()]
    assert found[1]["model"] > 0.8 * 2**30  # no room for its weights alone
    grown = abs(found[1]["peak"] - found[0]["peak"])
    assert grown < found[0]["two layers"] / 2, f"the peak depends on the number of layers: {found}"
    return {
        f"peak at {int(depth['layers'])} layers, model of {depth['model'] / 2**20:.0f} MiB": (
            f"{depth['peak'] / 2**20:.0f} MiB of 819 allowed"
        )
        for depth in found
    }


PARTS: dict[str, Callable[[Path], dict[str, object]]] = {
    "killed and continued": kills,
    "disks that fill up": full_disks,
    "hostile files": hostile_files,
    "two processes as one": processes,
    "bounded memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("build/reliability.json"), help="JSON of the figures"
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; more than once")
    arguments = parser.parse_args()
    table = Table("promise", "figure", "", "seconds")
    results, failed = {}, []
    for name in arguments.only or PARTS:
        print(f"{name} …", file=sys.stderr, flush=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(dir=arguments.out.resolve().parent) as folder:
            try:
                figures = PARTS[name](Path(folder))
            except Exception as error:  # the other parts count all the same
                failed.append(name)
                figures = {"broken": str(error) or traceback.format_exc(limit=-1)}
        seconds = time.monotonic() - start
        results[name] = {**figures, "seconds": round(seconds)}
        for i, (figure, value) in enumerate(figures.items()):
            table.add_row("" if i else name, figure, escape(str(value)), "" if i else f"{seconds:.0f}")
    only = "".join(f" --only '{name}'" for name in arguments.only or ())
    command = f"python -m tests.reliability{only} --out {arguments.out}"
    replace_file(arguments.out, json.dumps({"command": command, "parts": results}, indent=1))
    Console().print(table)
    if failed:
        raise SystemExit(f"broken: {', '.join(failed)}")


if __name__ == "__main__":
    main()
