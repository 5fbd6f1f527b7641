"""What the benchmarks of every device share: races, and result files that are never half written."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

Run = Callable[[], object]
Row = dict[str, object]


@dataclasses.dataclass(frozen=True)
class Race:
    """Seconds per call by runner, one entry a round, and why a rival did not take part."""

    times: dict[str, list[float]]
    errors: dict[str, str] = dataclasses.field(default_factory=dict)

    def rivals(self) -> list[str]:
        """The rivals that were timed, forms taken together."""
        return list(dict.fromkeys(name.split("/")[0] for name in self.times if name != "ours"))

    def ratio(self, *rivals: str) -> float:
        """How many times faster ours is than the fastest of ``rivals`` that were timed; NaN if none was."""
        ratios = self._ratios(rivals)
        return statistics.median(ratios) if ratios else math.nan

    def spread(self, *rivals: str) -> float:
        """Quartile distance of :meth:`ratio` over its median; NaN if none of ``rivals`` was timed."""
        ratios = self._ratios(rivals)
        if not ratios:
            return math.nan
        if len(ratios) < 2:
            return 0.0
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return (high - low) / median

    def seconds(self, name: str = "ours") -> float:
        return statistics.median(self.times[name])

    def row(self) -> Row:
        """The keys that every race has in a result file."""
        row: Row = {
            "rounds": len(self.times["ours"]),
            "seconds": {name: self.seconds(name) for name in self.times},
            "ratio": {name: self.ratio(name) for name in self.rivals()},
            "spread": {name: self.spread(name) for name in self.rivals()},
        }
        return row | ({"rival_errors": self.errors} if self.errors else {})

    def per_item(self, items: int) -> Race:
        """The same race when one call works through ``items`` equal ones."""
        return Race({name: [t / items for t in times] for name, times in self.times.items()}, self.errors)

    def _ratios(self, rivals: Sequence[str]) -> list[float]:
        forms = [times for name, times in self.times.items() if name.split("/")[0] in rivals]
        if not forms:
            return []
        fastest = [min(times) for times in zip(*forms, strict=True)]
        return [rival / ours for rival, ours in zip(fastest, self.times["ours"], strict=True)]


def measured(row: Row) -> Row:
    """``row`` without NaN: what is over a rival that failed is left out, as JSON has no NaN."""
    return {key: value for key, value in row.items() if not (isinstance(value, float) and math.isnan(value))}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def save(file: Path, content: Mapping[str, object]) -> None:
    """Writes the result file in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.tmp")
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(unfinished, file)
