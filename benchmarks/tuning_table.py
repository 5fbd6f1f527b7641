"""csrc/kernels/cuda/tuning_table.h from what tune.py measured: the thresholds of each GPU.

    python benchmarks/tuning_table.py benchmarks/results/*/tuning.json

writes the header from those files. Pure functions, no GPU, no torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HEADER = Path(__file__).resolve().parent.parent / "csrc/kernels/cuda/tuning_table.h"

Point = tuple[float, float, float]  # x, seconds of our way, seconds of the other


@dataclasses.dataclass(frozen=True, order=True)
class Tuning:
    """The struct of csrc/kernels/cuda/tuning.h; its fields say what they mean."""

    capability: int
    dense_tokens: int
    bitmap_dense_tokens: int
    mm_density: float
    sddmm_density: float
    tiles_per_sm: float


PRESENT = Tuning(0, 64, 64, 0.65, 0.3, 1.0)
"""The entry of every GPU that is not listed."""

# Bounds, so that tune.py can still make either way run by the density alone.
LOWEST_DENSITY, HIGHEST_DENSITY = 0.1, 0.95
LONGEST_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Measurements:
    """Seconds of two ways on one GPU.

    Attributes:
        capability: 10 * major + minor.
        mm, sddmm: by stored density, at many tokens: on stored blocks, and dense (with filling or gathering).
        tokens, bitmap: by tokens, with every block stored: on stored blocks, and dense with filling.
        tiles: by tall tiles per multiprocessor: seconds per output block of the tall tile, and of the low one
            where it fills the chip best.
    """

    capability: int
    mm: Sequence[Point]
    sddmm: Sequence[Point]
    tokens: Sequence[Point]
    bitmap: Sequence[Point]
    tiles: Sequence[Point]


def crossing(points: Sequence[Point]) -> float | None:
    """The x up to which ours is faster, between the points by linear interpolation; None: everywhere.

    The lowest x where ours is not faster any more: noise above it does not count.
    """
    points = sorted(points)
    for i, (x, ours, other) in enumerate(points):
        if ours <= other:
            continue
        if i == 0:
            return x
        before, ours_before, other_before = points[i - 1]
        gap_before, gap = other_before - ours_before, ours - other
        return before + (x - before) * gap_before / (gap_before + gap)
    return None


def density_threshold(points: Sequence[Point], present: float) -> float:
    """Rounded to a twentieth, inside the bounds; the present one where nothing was measured."""
    if not points:
        return present
    found = crossing(points)
    rounded = HIGHEST_DENSITY if found is None else round(20 * found) / 20
    return min(max(LOWEST_DENSITY, rounded), HIGHEST_DENSITY)


def tokens_threshold(points: Sequence[Point], present: int) -> int:
    """The first number of tokens at which the dense way wins. If it never does: the next power of two after
    twice the last, a step that the next measurement can confirm or take further."""
    if not points:
        return present
    slower = [x for x, ours, other in sorted(points) if ours > other]
    if slower:
        return int(slower[0])
    last = int(max(points)[0])
    return min(LONGEST_TOKENS, 1 << (2 * last - 1).bit_length())


def tiles_threshold(points: Sequence[Point], present: float) -> float:
    """Tall tiles from which they are no slower than low ones. Never less than now: below, none were run."""
    slower = [x for x, tall, low in points if tall > low]
    later = [x for x, tall, low in points if x > max(slower, default=0)]
    return max(present, min(later)) if slower and later else present


def tuning_from(measured: Measurements, present: Tuning) -> Tuning:
    return Tuning(
        measured.capability,
        tokens_threshold(measured.tokens, present.dense_tokens),
        tokens_threshold(measured.bitmap, present.bitmap_dense_tokens),
        density_threshold(measured.mm, present.mm_density),
        density_threshold(measured.sddmm, present.sddmm_density),
        round(tiles_threshold(measured.tiles, present.tiles_per_sm), 2),
    )


# -- the header ----------------------------------------------------------------------------------------------


def header(measured: Sequence[tuple[Tuning, str]]) -> str:
    """The text of tuning_table.h: the entry of all other GPUs, then those measured, with their names."""
    known = [tuning.capability for tuning, _ in measured]
    if len(set(known)) < len(known):
        raise ValueError(f"compute capabilities {known}: give one file for each")
    entries = [(PRESENT, "Every other GPU: estimates, not yet measured."), *sorted(measured)]
    rows = ""
    for tuning, comment in entries:
        numbers = ", ".join(repr(value) for value in dataclasses.astuple(tuning))
        rows += f"    // {comment}\n    {{{numbers}}},\n"
    return (
        "// Made by benchmarks/tuning_table.py from what benchmarks/tune.py measured; do not edit. Each way\n"
        "// was timed on both sides of a threshold, which lies where they take the same time.\n"
        "#pragma once\n"
        "\n"
        '#include "kernels/cuda/tuning.h"\n'
        "\n"
        "namespace fips::cuda {\n"
        "\n"
        f"inline constexpr Tuning kTuning[] = {{\n{rows}}};\n"
        "\n"
        "}  // namespace fips::cuda\n"
    )


def parse(text: str) -> dict[int, Tuning]:
    """The entries of a header by compute capability."""
    found = {}
    for numbers in re.findall(r"^    \{([-\d., ]+)\},$", text, re.MULTILINE):
        types = [int, int, int, float, float, float]
        fields = [kind(word) for kind, word in zip(types, numbers.split(","), strict=True)]
        found[fields[0]] = Tuning(*fields)
    return found


def present_tuning(capability: int, path: Path = HEADER) -> Tuning:
    """What a library built from this tree uses on a GPU."""
    entries = parse(path.read_text())
    return entries.get(capability, entries[0])


def read(path: Path) -> tuple[Tuning, str]:
    """The entry of one file of tune.py and the device's name."""
    content = json.loads(path.read_text())
    if content.get("dry_run"):
        raise ValueError(f"{path} is of a dry run")
    measured = measurements(content)
    return tuning_from(measured, Tuning(**content["present"])), f"{content['machine']['device']}."


def measurements(content: Mapping) -> Measurements:
    """What the rows of a result file say, by the threshold they are about."""
    by_kind: dict[str, list[Point]] = {}
    for row in content["rows"]:
        if "ours_s" in row:
            by_kind.setdefault(row["threshold"], []).append((row["x"], row["ours_s"], row["other_s"]))
    kinds = [field.name for field in dataclasses.fields(Measurements)][1:]
    return Measurements(content["machine"]["capability"], *(by_kind.get(kind, []) for kind in kinds))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", nargs="*", type=Path, help="tuning.json of each GPU; none: estimates alone"
    )
    parser.add_argument("--out", type=Path, default=HEADER, help=f"default: {HEADER.name} in its place")
    args = parser.parse_args(argv)
    args.out.write_text(header([read(path) for path in args.results]))
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
