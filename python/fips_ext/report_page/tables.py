"""Rows that the HTML and the Markdown form of the page share."""

from __future__ import annotations

from .facts import Facts


def rates(facts: Facts) -> list[tuple[str, str, str, str]]:
    """Dense and compressed bytes of MLPs, blocks and model, and multiply-adds where they are known."""
    info = facts.info
    names = {"mlp": "MLPs", "block": "linear maps of the blocks", "model": "whole model"}
    rows = []
    for key, name in names.items():
        dense, ratio = info["dense_bytes"][key], info["ratios"][key]
        rows.append((name, megabytes(dense), megabytes(dense * ratio), f"{ratio:.4f}"))
    macs = (info["report"] or {}).get("macs_ratio")
    if macs is not None:
        rows.append(("multiply-adds of the MLPs", "", "", f"{macs:.3f}"))
    return rows


def components(facts: Facts) -> list[tuple[str, str, str]]:
    """What the bytes of the weights file are."""
    sizes = facts.info["bytes"]
    total = sizes["total"]
    names = ("bases", "values", "scales", "index", "masks", "biases", "other")
    return [(name, f"{sizes[name]:,}", f"{sizes[name] / total:.1%}") for name in names if sizes[name]]


def speeds(facts: Facts) -> list[tuple[str, str, str, str]]:
    """Milliseconds per number of tokens, and dense over compressed."""
    return [
        (str(p.tokens), f"{p.dense:.3f}", f"{p.compressed:.3f}", f"{p.dense / p.compressed:.2f}")
        for p in facts.latency
    ]


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.2f} MB"
