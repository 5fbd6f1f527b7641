"""Quality against bytes, and against measured latency."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .results import STAGES, Results, Row, label, shown

_MARKERS = "os^Dv<>P*X"
_LOG_SPREAD = 3.0  # from here on a linear axis hides the small numbers
_DASHES = {"bitmap": "-", "block": "--", "low rank": ":"}


def plot(results: Results, rows: list[Row], text: str, path: Path) -> None:
    """Write a picture (the suffix decides the format).

    Every method is a line over its ratios: full marks after its last stage, hollow ones after the closed
    form where that was looked at too. Seeds are points of their own.

    Args:
        text: whose quality is drawn.
    """
    dense = results.dense[text]
    timed = any(row.speed for row in rows)
    figure, axes = plt.subplots(
        1, 1 + timed, squeeze=False, figsize=(6 + 5 * timed, 5), layout="constrained", sharey=True
    )
    panels = [("MLP bytes, compressed over dense", lambda row: row.mlp_ratio)]
    if timed:
        panels.append(("time per decoded token, compressed over dense", _latency))
    for axis, (title, value) in zip(axes[0], panels, strict=True):
        for number, method in enumerate(dict.fromkeys(row.method for row in rows)):
            mine = sorted((row for row in rows if row.method == method), key=lambda row: row.ratio)
            mine = [row for row in mine if value(row) is not None]
            if not mine:
                continue
            x = [value(row) for row in mine]
            last = [shown(row.last[text], dense) for row in mine]
            trained = [row for row in mine if len(row.quality) > 1]
            style = {
                "color": f"C{number % 10}",
                "marker": _MARKERS[number % len(_MARKERS)],
                "linestyle": _DASHES[mine[0].family.partition(":")[0]],
            }
            axis.plot(x, last, label=method, **style)
            if trained:
                x = [value(row) for row in trained]
                first = [shown(row.quality[STAGES[0]][text], dense) for row in trained]
                axis.plot(x, first, **{**style, "linestyle": "none"}, markerfacecolor="none", alpha=0.6)
        axis.set_xlabel(title)
        if _spread(results, rows, text) > _LOG_SPREAD:
            axis.set_yscale("log")
        axis.grid(True, which="both", alpha=0.25)
    axes[0][0].set_ylabel(label(dense, text))
    axes[0][0].legend(fontsize="small")
    title = f"{results.setting['model']}\nmarks after the last stage"
    if any(len(row.quality) > 1 for row in rows):
        title += ", hollow ones after the closed form"
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _spread(results: Results, rows: list[Row], text: str) -> float:
    """The largest number shown over the smallest."""
    dense = results.dense[text]
    values = [shown(stage[text], dense) for row in rows for stage in row.quality.values()]
    return max(values) / min(values) if min(values, default=0) > 0 else 0.0


def _latency(row: Row) -> float | None:
    return row.speed and 1 / row.speed["decode_ratio"]
