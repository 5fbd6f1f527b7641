"""Small drawings as SVG text. Colours are classes and ``currentColor``, so that the page decides them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_LEVELS = 8


def heat(grid: Sequence[Sequence[float]], label: str, cell: int = 6) -> str:
    """Squares, one per entry in [0, 1], darker for more; zero is left empty."""
    rows, columns = len(grid), max((len(row) for row in grid), default=0)
    paths: list[list[str]] = [[] for _ in range(_LEVELS + 1)]
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            level = min(_LEVELS, math.ceil(value * _LEVELS))
            paths[level].append(f"M{x} {y}h1v1h-1z")
    drawn = "".join(
        f'<path d="{"".join(squares)}" fill-opacity="{level / _LEVELS:.3f}"/>'
        for level, squares in enumerate(paths)
        if level and squares
    )
    return (
        f'<svg class="heat" role="img" aria-label="{escape(label)}" viewBox="0 0 {columns} {rows}" '
        f'style="max-width:{columns * cell}px" shape-rendering="crispEdges">'
        f'<rect class="frame" width="{columns}" height="{rows}"/>{drawn}</svg>'
    )


def bars(rows: Sequence[tuple[str, Sequence[float | None]]], label: str) -> str:
    """Horizontal bars, a group per row, on one scale that begins at zero; None leaves its place empty."""
    largest = max((value for _, values in rows for value in values if value is not None), default=0) or 1.0
    thick, left, width = 9, 200, 600
    step = thick * max((len(values) for _, values in rows), default=0) + 6
    parts = []
    for i, (name, values) in enumerate(rows):
        top = i * step
        parts.append(_text(left - 6, top + step / 2, name, "end"))
        for j, value in enumerate(values):
            if value is not None:
                y, length = top + j * thick, (width - left - 60) * value / largest
                size = f'width="{length:.1f}" height="{thick - 1}"'
                parts.append(f'<rect class="s{j}" x="{left}" y="{y}" {size}/>')
                parts.append(_text(left + length + 4, y + thick - 2, f"{value:.4g}"))
    return _drawing(label, width, max(1, len(rows)) * step, "".join(parts))


def lines(
    curves: dict[str, Sequence[tuple[float, float]]],
    label: str,
    x_title: str,
    y_title: str,
    log: bool = False,
) -> str:
    """Curves over a common plane; with ``log`` both axes are logarithmic (points must be positive)."""
    width, height, left, bottom = 600, 260, 60, 40
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    scale = math.log10 if log else float
    xs, ys = [scale(x) for x, _ in points], [scale(y) for _, y in points]
    low, high = min(ys), max(ys)
    if not log:
        low = min(0.0, low)
    x0, x1, y0, y1 = min(xs), max(xs), low, high if high > low else low + 1
    x1 = x1 if x1 > x0 else x0 + 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (width - left - 10) * (scale(x) - x0) / (x1 - x0)
        return across, 10 + (height - bottom - 10) * (1 - (scale(y) - y0) / (y1 - y0))

    parts = [f'<path class="axis" d="M{left} 10V{height - bottom}H{width - 10}"/>']
    for x in sorted({x for x, _ in points}) if log else (x0, x1):
        parts.append(_text(place(x, points[0][1])[0], height - bottom + 14, f"{x:g}", "middle"))
    for y in _ticks(y0, y1, log):
        parts.append(_text(left - 6, place(points[0][0], y)[1] + 3, f"{y:.3g}", "end"))
    for j, (name, curve) in enumerate(curves.items()):
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(*point) for point in curve))
        parts.append(f'<polyline class="s{j}" points="{path}"/>')
        parts.append(_text(left + 10 + 130 * j, height - 4, f"— {name}", style=f"s{j}"))
    parts.append(_text(width - 10, height - 4, x_title, "end"))
    parts.append(_text(left, 8, y_title))
    return _drawing(label, width, height, "".join(parts))


def _text(x: float, y: float, content: str, anchor: str = "start", style: str = "") -> str:
    named = f' class="{style}"' if style else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def _ticks(low: float, high: float, log: bool) -> list[float]:
    values = [low + (high - low) * i / 4 for i in range(5)]
    return [10**v for v in values] if log else values


def _drawing(label: str, width: int, height: float, content: str) -> str:
    return (
        f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height:g}" '
        f'style="max-width:{width}px">{content}</svg>'
    )
