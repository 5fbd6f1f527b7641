"""The page as one HTML file: no script, nothing from the network, light and dark."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterable, Sequence
from html import escape

from ..nn.base import base_label
from . import svg
from .facts import Facts, Group, Layer
from .tables import components, rates, speeds

_STYLE = (importlib.resources.files(__package__) / "style.css").read_text(encoding="utf-8")


def to_html(facts: Facts) -> str:
    """One self-contained file."""
    sections = [
        _section("Before and after", _table(("", "dense", "compressed", "ratio"), rates(facts))),
        _section("What the bytes are", _table(("", "bytes", "share"), components(facts))),
        _errors(facts.layers),
        _bytes(facts.layers),
        _groups(facts.groups, facts.layers),
        _maps(facts.layers),
        _latency(facts),
        _samples(facts.samples),
        _recipe(facts),
    ]
    title = escape(facts.title)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>",
            f"<style>\n{_STYLE}</style>",
            "</head>",
            "<body>",
            f"<h1>{title}</h1>",
            *filter(None, sections),
            "</body>",
            "</html>\n",
        ]
    )


def _section(title: str, *parts: str, note: str = "") -> str:
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return "\n".join((f"<h2>{title}</h2>", said, *parts))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values) + "</tr>"

    body = "".join(cells("td", row) for row in rows)
    return f'<div class="wide"><table>{cells("th", header)}{body}</table></div>'


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def _errors(layers: list[Layer]) -> str:
    rows = [(layer.name, (layer.error_before, layer.error_after)) for layer in layers]
    if all(value is None for _, values in rows for value in values):
        return ""
    said = (
        "Relative squared error of each MLP on held-out tokens: in the closed form (first bar), and after "
        "block-wise training (second)."
    )
    return _section("Error per layer", svg.bars(rows, "error per layer"), note=said)


def _bytes(layers: list[Layer]) -> str:
    rows = [(layer.name, (layer.nbytes / layer.dense_bytes,)) for layer in layers if layer.dense_bytes]
    if not rows:
        return ""
    said = "Bytes of each MLP over dense; a base counts with the layer that owns it."
    return _section("Where the bytes went", svg.bars(rows, "bytes per layer"), note=said)


def _groups(groups: list[Group], layers: list[Layer]) -> str:
    parts = []
    for number, group in enumerate(groups):
        names = [layer.name for layer in layers if layer.group == number]
        span = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
        parts.append(f"<h3>{escape(span)}: {base_label(group.rank, group.identity)}</h3>")
        if group.spectrum:
            curve = {"singular values of U": list(enumerate(group.spectrum))}
            parts.append(svg.lines(curve, f"spectrum of base {number}", "base vector", "over the largest"))
        caption = "Layers (rows) by blocks of base vectors (columns): how densely each is used."
        parts.append(_figure(svg.heat(group.usage, f"use of base {number}", cell=20), caption))
    return _section("Bases, and who uses them", *parts)


def _maps(layers: list[Layer]) -> str:
    figures = [
        _figure(svg.heat(grid, f"{layer.name} {role}"), f"{layer.name} · {role} · {layer.density[role]:.3f}")
        for layer in layers
        for role, grid in layer.fill.items()
    ]
    said = (
        "Rows are base vectors, columns hidden neurons; one square per block, darker where more of it is "
        "stored. The number is the density."
    )
    maps = f'<div class="maps">{"".join(figures)}</div>'
    listed = f"<details open><summary>{len(figures)} slices</summary>{maps}</details>"
    return _section("Blocks of V", listed, note=said)


def _latency(facts: Facts) -> str:
    if not facts.latency:
        return ""
    curves = {
        "compressed": [(point.tokens, point.compressed) for point in facts.latency],
        "dense": [(point.tokens, point.dense) for point in facts.latency],
    }
    said = (
        f"Median milliseconds of the first MLP on {facts.device}, and of dense weights with the vendor's "
        "products, measured in turns."
    )
    return _section(
        "Latency of one MLP",
        svg.lines(curves, "latency against tokens", "tokens", "ms", log=True),
        _table(("tokens", "dense ms", "compressed ms", "speed-up"), speeds(facts)),
        note=said,
    )


def _samples(samples: list[tuple[str, str]]) -> str:
    quotes = [f"<blockquote><b>{escape(p)}</b>{escape(text)}</blockquote>" for p, text in samples]
    return _section("What it writes", *quotes) if quotes else ""


def _recipe(facts: Facts) -> str:
    recipe = facts.info["recipe"]
    if recipe is None:
        return ""
    text = escape(json.dumps(recipe, indent=1))
    return _section("Recipe", f"<details><summary>all fields</summary><pre>{text}</pre></details>")
