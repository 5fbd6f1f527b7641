"""The page as Markdown: the tables, without drawings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from ..nn.base import base_label
from .facts import Facts
from .tables import components, rates, speeds


def to_markdown(facts: Facts) -> str:
    """Tables of everything that has a number."""
    lines = [
        f"# {facts.title}",
        "",
        *table(("", "dense", "compressed", "ratio"), rates(facts)),
        *table(("part", "bytes", "share"), components(facts)),
        *table(("layer", "base", "density", "bytes", "error before", "error after"), _layers(facts)),
    ]
    if facts.latency:
        lines += [f"Latency of the first MLP on {facts.device}, median:", ""]
        lines += table(("tokens", "dense ms", "compressed ms", "speed-up"), speeds(facts))
    for prompt, continuation in facts.samples:
        text = "".join((f"**{prompt}**", continuation)).splitlines()
        lines += [*(f"> {line}" for line in text), ""]
    if facts.info["recipe"] is not None:
        lines += ["```json", json.dumps(facts.info["recipe"], indent=1), "```", ""]
    return "\n".join(lines)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    shown = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return [*shown, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _layers(facts: Facts) -> Iterable[Sequence[str]]:
    for layer in facts.layers:
        group = facts.groups[layer.group]
        base = base_label(group.rank, group.identity)
        density = ", ".join(f"{role} {value:.3f}" for role, value in layer.density.items())
        ratio = "–" if not layer.dense_bytes else f"{layer.nbytes / layer.dense_bytes:.3f}"
        errors = ("–" if e is None else f"{e:.4f}" for e in (layer.error_before, layer.error_after))
        yield (layer.name, base, density, ratio, *errors)
