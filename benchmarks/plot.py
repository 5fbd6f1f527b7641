"""Tables and plots from result files of the CPU benchmarks; measures nothing.

    pip install matplotlib
    python benchmarks/plot.py benchmarks/results/cpu/*.json --out plots

Every ``name.json`` becomes ``name.md``, a Markdown table of its rows, and ``name.png`` (``--format svg`` for
vectors): the ratio over each rival against the number of tokens. ``--where block=64x64`` plots the rows with
that value alone, of those that have the key; it may be given several times.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, object]

COLUMNS = ("case", "dtype", "T", "density", "block", "encoding", "rival")
MEASURES = ("e", "best_ratio", "time_over_bytes", "excess_residual")  # where a benchmark reports them
MARKERS = "osD^v<>Pp*"
PANELS_ACROSS = 3


def cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def verdict(row: Row) -> str:
    if row.get("met") is None:
        return ""
    condition = f"{row['measure']} {row['bound']} {cell(row['must'])}"
    return f"{row['goal']} {condition}: {'met' if row['met'] else 'missed'}".strip()


def to_markdown(name: str, result: dict) -> str:
    machine, rows = result["machine"], result["rows"]
    peaks = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in machine["peak_flops"].items())
    keys = [key for key in COLUMNS if any(row.get(key) not in (None, "") for row in rows)]
    measures = [key for key in MEASURES if any(key in row for row in rows)]
    header = [*keys, "ours ms", "rival ms", "ratio", "spread", *measures, "roofline", "goal"]
    lines = [
        f"# {name}",
        "",
        f"`{result['command']}` on {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"kernels {machine['fips']['cpu_isa']}. Measured peaks: {peaks}, "
        f"read {machine['read_bytes_per_s'] / 1e9:.1f} GB/s.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    for row in rows:
        cells = [cell(row.get(key)) for key in keys]
        if "ours_s" in row:
            cells += [cell(row["ours_s"] * 1e3), cell(row["rival_s"] * 1e3)]
            cells += [cell(row[key]) for key in ("ratio", "spread")]
            cells += [cell(row.get(key)) for key in measures]
            cells += [cell(row["roofline_share"]), verdict(row)]
        else:
            reason = "skipped" if "skipped" in row else "error"
            cells += [""] * (len(header) - len(cells) - 1) + [f"{reason}: {row[reason]}".replace("|", "/")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot_ratios(name: str, rows: list[Row], path: Path) -> None:
    """A panel per rival and dtype; colours are cases, markers are the slice's density, block and encoding."""
    x_key = "T" if any(row.get("T") is not None for row in rows) else "batch"
    panels: dict[str, dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        lines = panels.setdefault(f"{row['dtype']} over {row['rival']}", {})
        lines.setdefault((row["case"], slice_of(row)), []).append(row)
    colors = assign(matplotlib.color_sequences["tab20"], (row["case"] for row in rows))
    markers = assign(MARKERS, map(slice_of, rows))

    across = min(PANELS_ACROSS, len(panels))
    down = -(-len(panels) // across)
    size = (4.2 * across + 3, 3.2 * down + 0.6)
    figure, axes = plt.subplots(down, across, squeeze=False, figsize=size, layout="constrained")
    for axis, (title, lines) in itertools.zip_longest(axes.flat, panels.items(), fillvalue=("", {})):
        if not lines:
            axis.set_axis_off()
            continue
        for (case, kind), points in lines.items():
            points.sort(key=lambda row: row[x_key])
            x, y = [row[x_key] for row in points], [row["ratio"] for row in points]
            axis.plot(x, y, color=colors[case], marker=markers[kind], linewidth=0.8, markersize=4)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=title, xscale="log", yscale="log", xlabel=x_key, ylabel="ratio (> 1: ours is faster)")
        axis.set_xticks(sorted({row[x_key] for points in lines.values() for row in points}))
        axis.minorticks_off()
        axis.set_yticks(ratio_ticks(*axis.get_ylim()))
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter("{x:g}")
    handles = [plt.Line2D([], [], color=color, label=case) for case, color in colors.items()]
    handles += [
        plt.Line2D([], [], color="grey", linestyle="", marker=marker, label=kind)
        for kind, marker in markers.items()
        if kind
    ]
    figure.suptitle(name)
    figure.legend(handles=handles, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def assign(styles: Sequence, keys: Iterable[str]) -> dict[str, object]:
    """A style for each distinct key, in the order of appearance; styles repeat when they run out."""
    return {key: styles[i % len(styles)] for i, key in enumerate(dict.fromkeys(keys))}


def ratio_ticks(low: float, high: float) -> list[float]:
    """Round numbers inside a logarithmic axis."""
    decades = range(-3, 4)
    return [t for k in decades for digit in (1, 1.5, 2, 3, 5, 7) if low <= (t := digit * 10.0**k) <= high]


def slice_of(row: Row) -> str:
    words = (f"p={row['density']}" if row.get("density") else "", row.get("block"), row.get("encoding"))
    return " ".join(word for word in words if word)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, help="files that the benchmarks wrote with --json")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and plots")
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    parser.add_argument(
        "--where", action="append", default=[], metavar="KEY=VALUE", help="plot these rows only"
    )
    args = parser.parse_args()
    wanted = [condition.partition("=")[::2] for condition in args.where]
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.results:
        result = json.loads(path.read_text())
        if "rows" not in result:
            print(f"{path.stem}: no rows (not of a kernel benchmark); skipped")
            continue
        (args.out / f"{path.stem}.md").write_text(to_markdown(path.stem, result))
        measured = [
            row
            for row in result["rows"]
            if "ratio" in row
            and not row.get("summary")
            and all(str(row.get(key, value)) == value for key, value in wanted)
        ]
        if measured:
            plot_ratios(path.stem, measured, args.out / f"{path.stem}.{args.format}")
        print(f"{path.stem}: {len(result['rows'])} rows")


if __name__ == "__main__":
    main()
