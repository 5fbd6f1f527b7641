"""A comparison as rows of text: one table, for the terminal and for Markdown."""

from __future__ import annotations

import dataclasses

from .results import STAGES, Results, Row, label, shown


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as they are printed; ``sections`` are the numbers of the rows that start a new ratio."""

    title: str
    header: list[str]
    rows: list[list[str]]
    sections: list[int]

    def to_markdown(self) -> str:
        lines = [f"**{self.title}**", "", _line(self.header), "|" + "---|" * len(self.header)]
        return "\n".join([*lines, *map(_line, self.rows)]) + "\n"


def tabulate(results: Results, rows: list[Row], text: str) -> Table:
    """Quality on one text after every stage, best last stage of a ratio first.

    Bytes (of the MLPs, and of all tensors of the file) and multiply-adds (of the MLPs) are compressed over
    dense; decode and prefill are speeds over dense.
    """
    dense = results.dense[text]
    stages = [stage for stage in STAGES if any(stage in row.quality for row in rows)]
    timed = ("decode", "prefill") if any(row.speed for row in rows) else ()
    header = ["ratio", "method", "bytes", "file", "MACs", *stages, *timed]
    cells, sections = [], []
    for ratio in dict.fromkeys(row.ratio for row in rows):
        sections.append(len(cells))
        group = sorted((row for row in rows if row.ratio == ratio), key=lambda row: row.last[text]["value"])
        for row in group:
            quality = (row.quality.get(stage) for stage in stages)
            cells.append(
                [
                    f"{ratio:g}",
                    row.method + (f" (seed {row.seed})" if row.seed else ""),
                    f"{row.mlp_ratio:.3f}",
                    f"{row.model_ratio:.3f}",
                    f"{row.macs_ratio:.2f}",
                    *("–" if q is None else f"{shown(q[text], dense):.3f}" for q in quality),
                    *(f"{row.speed[f'{what}_ratio']:.2f}" if row.speed else "–" for what in timed),
                ]
            )
    return Table(label(dense, text), header, cells, sections)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
