"""Every goal of the GPU kernels against a folder of result files: measured, must, good, stretch, verdict.

    python benchmarks/goals.py benchmarks/results/gpu

Prints a Markdown table and writes goals.md and goals.json beside the results. A goal that several rows answer
is as good as the worst of them. G13 and G14 are the CPU's and judged by its own benchmarks. With ``--strict``
the exit code is 1 if a *must* is missed. Files of a dry run are not judged.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

Row = Mapping[str, object]
Results = Mapping[str, Mapping]  # by benchmark

LEVELS = ("must", "good", "stretch")
MISSED, NOT_MEASURED = "missed", "not measured"


@dataclasses.dataclass(frozen=True)
class Goal:
    """A measure of the rows of one result file that have the values ``where``.

    Attributes:
        measure: a key, or ``key.key`` into a nested one.
        levels: what the measure must at least reach, or at most.
        every: whether a row that failed or was skipped leaves the goal unmeasured.
    """

    id: str
    part: str
    file: str
    where: Row
    measure: str
    levels: tuple[float | None, float | None, float | None]
    at_most: bool = False
    every: bool = True

    def met(self, value: float, level: float) -> bool:
        return value <= level if self.at_most else value >= level

    def worst(self, values: Sequence[float]) -> float:
        return max(values) if self.at_most else min(values)


@dataclasses.dataclass(frozen=True)
class Verdict:
    goal: Goal
    value: float | None
    verdict: str  # the highest level that is met, MISSED or NOT_MEASURED
    note: str = ""

    @property
    def fails(self) -> bool:
        return self.verdict == MISSED

    def as_row(self) -> dict[str, object]:
        levels = dict(zip(LEVELS, self.goal.levels, strict=True))
        return {
            "goal": self.goal.id,
            "part": self.goal.part,
            "measure": self.goal.measure,
            "bound": "at most" if self.goal.at_most else "at least",
            "value": self.value,
            **levels,
            "verdict": self.verdict,
            "note": self.note,
        }


# -- the goals -----------------------------------------------------------------------------------------------

PRODUCT, MLP, BACKWARD, INIT, ACCURACY = "block_sparse_mm", "shared_mlp", "backward", "init", "accuracy"
FORWARD = {"transpose": False, "dtype": "bfloat16", "encoding": "block"}
LARGE = {**FORWARD, "T": 4096, "r": 2048, "n": 8192}
VISION = {**FORWARD, "T": 12608, "r": 768, "n": 3072, "block": "64x64", "density": 0.25}
DECODE = {**FORWARD, "r": 2048, "n": 14336}
MODEL = {"dtype": "bfloat16", "encoding": "block", "a": 0.5, "density": 0.25, "default_block": True}
BITMAP = {"dtype": "bfloat16", "encoding": "bitmap", "density": 0.5, "T": 1}


def product_goals() -> Iterator[Goal]:
    tall = {**LARGE, "block": "64x128"}
    yield Goal("G1", "T=4096 128×64 p=.25: e", PRODUCT, {**tall, "density": 0.25}, "e", (0.65, 0.78, 0.88))
    yield Goal("G2", "T=12608 64×64 p=.25: e", PRODUCT, VISION, "e", (0.50, 0.70, 0.80))
    for edge, levels in ((32, (0.35, 0.5, 0.6)), (16, (0.20, 0.3, 0.4))):
        where = {**LARGE, "block": f"{edge}x{edge}", "density": 0.1}
        yield Goal("G3", f"{edge}×{edge} p=.1: e", PRODUCT, where, "e", levels)
    for density, levels in ((0.5, (1.3, 1.55, 1.75)), (0.25, (2.6, 3.1, 3.5)), (0.1, (5.5, 7, 8))):
        where = {**tall, "density": density}
        yield Goal("G4", f"p={density:g}: over cuBLAS", PRODUCT, where, "ratio.dense", levels)
    triton = "ratio.triton"
    for where, part in (({**tall, "density": 0.25}, "128×64"), (VISION, "64×64")):
        yield Goal("G5", f"{part} p=.25: over Triton BSR", PRODUCT, where, triton, (1.3, 1.8, 2.2))
    for edge in (32, 16):
        where = {**LARGE, "block": f"{edge}x{edge}", "density": 0.1}
        yield Goal("G5", f"{edge}×{edge} p=.1: over Triton BSR", PRODUCT, where, triton, (2, 3, 5))
    decode = {**DECODE, "T": 16, "block": "64x64", "density": 0.25}
    yield Goal("G5", "decode T=16: over Triton BSR", PRODUCT, decode, triton, (1.3, 1.6, 2))


def mlp_goals() -> Iterator[Goal]:
    prefill = (
        ("Llama-3-8B", 0.5, (2.5, 3.2, 3.7)),
        ("Llama-3-8B", 1.0, (1.3, 1.6, 1.8)),
        ("Gemma-2-2B", 0.5, (2.5, 3.2, 3.8)),
    )
    for model, rank_share, levels in prefill:
        where = {**MODEL, "case": model, "T": 4096, "a": rank_share}
        yield Goal("G6", f"{model} a={rank_share:g} T=4096: over dense", MLP, where, "ratio.dense", levels)
    vision = (
        ("DeiT-B", 12608, (1.7, 2.2, 2.8)),
        ("Swin-L s1", 200704, (1.2, 2.0, 3)),
        ("Swin-L s2", 50176, (1.4, 2.2, 2.8)),
    )
    for model, tokens, levels in vision:
        where = {**MODEL, "case": model, "T": tokens}
        yield Goal("G7", f"{model} batch 64: over dense", MLP, where, "ratio.dense", levels)
    decode = (("Llama-3-8B", (2.8, 3.5, 4.0)), ("Gemma-2-2B", (1.8, 2.3, 2.8)))
    for model, levels in decode:
        for tokens in (1, 8):
            where = {**MODEL, "case": model, "T": tokens}
            yield Goal("G8", f"{model} decode T={tokens}: over dense", MLP, where, "ratio.dense", levels)


def bandwidth_goals() -> Iterator[Goal]:
    levels = (0.60, 0.72, 0.82)
    for model in ("Llama-3-8B", "Gemma-2-2B"):
        for tokens in (1, 8):
            where = {**MODEL, "case": model, "T": tokens}
            yield Goal("G9", f"{model} T={tokens}: share of copy", MLP, where, "copy_share", levels)
    for tokens in (1, 8):
        where = {**DECODE, "T": tokens, "block": "64x128", "density": 0.5}
        yield Goal("G9", f"product T={tokens}: share of copy", PRODUCT, where, "copy_share", levels)
    for model in ("Llama-3-8B", "Gemma-2-2B"):
        where = {**BITMAP, "case": model}
        part = f"{model} bitmap T=1: share of the byte limit"
        yield Goal("G16", part, MLP, where, "byte_limit_share", (0.6, 0.75, 0.85))
    where = {**BITMAP, "r": 2048, "n": 14336, "transpose": False}
    part = "product bitmap T=1: share of the byte limit"
    yield Goal("G16", part, PRODUCT, where, "byte_limit_share", (0.6, 0.75, 0.85))


def training_goals() -> Iterator[Goal]:
    for density, levels in ((0.25, (1.0, 1.4, 1.8)), (0.1, (1.5, 2.2, 3))):
        where = {"case": "sddmm Llama-3-8B", "default_block": False, "density": density}
        yield Goal("G10", f"dV p={density:g}: over dense", BACKWARD, where, "ratio.dense", levels)
    step = {"case": "loss Llama-3-8B", "density": 0.25}
    yield Goal("G11", "training step: over dense", BACKWARD, step, "ratio.dense", (1.8, 2.3, 2.8))
    part = "peak memory over dense"
    yield Goal("G11", part, BACKWARD, step, "memory_ratio", (0.6, 0.4, None), at_most=True)


def init_goals() -> Iterator[Goal]:
    for d, levels in ((768, (5, 15, 30)), (4096, (3, 8, 30))):
        where = {"method": "rsvd", "d": d}
        yield Goal("G12", f"d={d}: over svd_lowrank", INIT, where, "ratio.svd_lowrank", levels)
        residual = (5e-3, 1.5e-3, None)
        part = f"d={d}: excess residual"
        yield Goal("G12", part, INIT, where, "excess_residual", residual, at_most=True)


def accuracy_goals() -> Iterator[Goal]:
    for precision in ("float32", "tf32", "bfloat16", "float16"):
        for op in ("product", "transposed", "sddmm", "mlp", "gradients"):
            if precision == "tf32" and op in ("transposed", "sddmm"):
                continue
            where = {"precision": precision, "op": op}
            part = f"{op} {precision}: error over its bound"
            yield Goal("G15", part, ACCURACY, where, "error_over_bound", (1, 1, 1), at_most=True)
    for op in ("sddmm", "gradients", "mlp"):
        part = f"{op}: repeats that differ"
        yield Goal("G15", part, ACCURACY, {"op": f"repeats {op}"}, "different", (0, 0, 0), at_most=True)


def planner_goals() -> Iterator[Goal]:
    levels = (0.97, 0.99, 1.0)
    grids = (
        ("MLP, no extra memory", MLP, {"cached": False}),
        ("MLP, dense copies allowed", MLP, {"may_cache": True}),
        ("product", PRODUCT, {}),
        ("gradients", BACKWARD, {}),
    )
    for grid, file, where in grids:
        part = f"{grid}: worst case over the best dense form"
        yield Goal("G17", part, file, where, "best_ratio", levels, every=False)


GOALS: tuple[Goal, ...] = (
    *product_goals(),
    *mlp_goals(),
    *bandwidth_goals(),
    *training_goals(),
    *init_goals(),
    *accuracy_goals(),
    *planner_goals(),
)


# -- judging -------------------------------------------------------------------------------------------------


def lookup(row: Row, measure: str) -> float | None:
    """The number at ``key.key`` of a row, or None."""
    value: object = row
    for key in measure.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def matches(row: Row, where: Row) -> bool:
    return all(key in row and row[key] == value for key, value in where.items())


def judge(goal: Goal, results: Results) -> Verdict:
    """The verdict on one goal, with the reason where it is not measured."""

    def unmeasured(note: str) -> Verdict:
        return Verdict(goal, None, NOT_MEASURED, note)

    content = results.get(goal.file)
    if content is None:
        return unmeasured(f"no {goal.file}.json")
    if content.get("dry_run"):
        return unmeasured(f"{goal.file}.json is of a dry run")
    rows = [row for row in content["rows"] if matches(row, goal.where)]
    measured = [row for row in rows if is_measured(row, goal.measure)]
    others = rows if goal.every else [row for row in content["rows"] if "error" in row or "skipped" in row]
    lost = [row for row in others if row not in measured and not has_twin(row, measured)]
    if lost and (goal.every or not measured):
        return unmeasured(reason_missing(lost[0], goal.measure))
    if not measured:
        return unmeasured("no such case in a quick run" if content.get("quick") else "no such case")
    value = goal.worst([lookup(row, goal.measure) for row in measured])
    worst = next(row for row in measured if lookup(row, goal.measure) == value)
    notes = [f"worst of {len(measured)}: {label(worst)}"] if len(measured) > 1 else []
    notes += [f"{len(lost)} more failed or skipped"] if lost else []
    return Verdict(goal, value, level_of(goal, value), "; ".join(notes))


def is_measured(row: Row, measure: str) -> bool:
    value = lookup(row, measure)
    return value is not None and math.isfinite(value)


def has_twin(lost: Row, measured: Sequence[Row]) -> bool:
    """Whether the case of a row that failed was measured all the same: it failed in a later part."""
    keys = {key: value for key, value in lost.items() if key not in ("error", "skipped")}
    return "error" in lost and any(matches(row, keys) for row in measured)


def reason_missing(row: Row, measure: str) -> str:
    for kind in ("error", "skipped"):
        if kind in row:
            return f"{kind}: {row[kind]}"
    rival = measure.rpartition(".")[2]
    errors = row.get("rival_errors")
    errors = errors if isinstance(errors, Mapping) else {}
    reason = row.get(f"{rival}_error") or errors.get(rival)
    if reason:
        return f"{rival}: {reason}"
    failed = "; ".join(f"{name}: {error}" for name, error in errors.items())
    return f"the row has no {measure}" + (f" ({failed})" if failed else "")


def label(row: Row) -> str:
    density = f"p={row['density']}" if "density" in row else ""
    tokens = f"T={row['T']}" if "T" in row else ""
    words = (row.get("case"), row.get("dtype"), tokens, row.get("encoding"), density, row.get("block"))
    return " ".join(str(word) for word in words if word)


def level_of(goal: Goal, value: float) -> str:
    reached = [
        name
        for name, level in zip(LEVELS, goal.levels, strict=True)
        if level is not None and goal.met(value, level)
    ]
    return reached[-1] if reached else MISSED


def judge_all(results: Results) -> list[Verdict]:
    return [judge(goal, results) for goal in GOALS]


# -- reading and writing -------------------------------------------------------------------------------------


def read_results(folder: Path) -> dict[str, dict]:
    """The result files of a folder by benchmark; other files are left out."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "benchmark" in content and "rows" in content:
            found[path.stem] = content
    return found


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def to_markdown(verdicts: Sequence[Verdict], results: Results) -> str:
    machines = dict.fromkeys(machine_name(content) for content in results.values())
    lines = [f"# Goals on {', '.join(machines) or 'no machine'}", ""]
    lines += ["| goal | part | measured | must | good | stretch | verdict |", "|---|---|---|---|---|---|---|"]
    for v in verdicts:
        sign = "≤ " if v.goal.at_most else ""
        levels = [sign + number(level) if level is not None else "" for level in v.goal.levels]
        note = f" ({v.note})" if v.note else ""
        verdict = (v.verdict.upper() if v.fails else v.verdict) + note.replace("|", "/").replace("\n", " ")
        lines.append(" | ".join(["| " + v.goal.id, v.goal.part, number(v.value), *levels, verdict]) + " |")
    return "\n".join([*lines, "", summary(verdicts)]) + "\n"


def machine_name(content: Mapping) -> str:
    machine = content.get("machine", {})
    return f"{machine.get('device', 'an unknown device')}, torch {machine.get('torch', '?')}"


def summary(verdicts: Sequence[Verdict]) -> str:
    counts = {kind: sum(v.verdict == kind for v in verdicts) for kind in (*LEVELS, MISSED, NOT_MEASURED)}
    return "Highest level reached: " + ", ".join(f"{kind} {count}" for kind, count in counts.items()) + "."


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the benchmarks wrote their JSON files")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a must is missed")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        parser.error(f"{args.folder} is not a folder")
    results = read_results(args.folder)
    verdicts = judge_all(results)
    table = to_markdown(verdicts, results)
    print(table, end="")
    (args.folder / "goals.md").write_text(table)
    rows = [verdict.as_row() for verdict in verdicts]
    (args.folder / "goals.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return 1 if args.strict and any(verdict.fails for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
