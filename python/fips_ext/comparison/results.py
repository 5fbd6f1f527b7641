"""Measured cells in one JSON file, written after each, so that an interrupted comparison goes on."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import torch

from .._atomic import replace_file
from ..errors import InvalidArgument
from ..recipe import Recipe

_THEN = " && "

STAGES = ("closed form", "trained", "distilled")


@dataclasses.dataclass(frozen=True)
class Row:
    """One method at one ratio with one seed.

    Attributes:
        method, family: see :class:`~.methods.Method`.
        ratio: asked for.
        seed: of the recipe.
        quality: after each of :data:`STAGES` that ran, or the last of them, per text (or other measure): at
            least its ``name``, its ``value``, lower is better, and whether it is shown ``relative`` to that
            of the dense model.
        mlp_ratio, linear_ratio, model_ratio, macs_ratio: reached; see :class:`fips_ext.Report`.
        speed: ``decode_ratio`` and ``prefill_ratio`` over dense and more, where it was measured.
        seconds: per stage, measuring left out.
        recipe: all fields.
    """

    method: str
    family: str
    ratio: float
    seed: int
    quality: dict[str, dict[str, Any]]
    mlp_ratio: float
    linear_ratio: float
    model_ratio: float
    macs_ratio: float
    speed: dict[str, Any] | None
    seconds: dict[str, float]
    recipe: dict[str, Any]

    @property
    def last(self) -> dict[str, Any]:
        """Quality per text after the last stage."""
        return self.quality[[stage for stage in STAGES if stage in self.quality][-1]]


class Results:
    """The rows, and what they were measured on.

    Args:
        path: of the JSON file; read if it exists.
        setting: everything a number depends on beside its row: model, texts, dtype.
        notes: written beside it, see :func:`provenance`; a file that grew names its commands joined by
            ``&&``, and the machine of the last.

    Raises:
        InvalidArgument: the file is no result file, or one of another setting.
    """

    def __init__(self, path: Path, setting: dict[str, Any], notes: dict[str, Any]) -> None:
        self.path, self.setting, self.notes = path, setting, notes
        self.dense: dict[str, Any] | None = None
        self.rows: list[Row] = []
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            setting, dense = found["setting"], found["dense"]
            rows = [Row(**row) for row in found["rows"]]
            commands = found["command"].split(_THEN)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidArgument(
                f"out: {self.path} is not a result file of a comparison ({error}); give another folder"
            ) from error
        if setting != self.setting:
            changed = sorted(k for k in {*setting, *self.setting} if setting.get(k) != self.setting.get(k))
            raise InvalidArgument(
                f"out: {self.path} holds results of another setting ({', '.join(changed)} differ); give "
                "another folder, or remove it"
            )
        self.dense, self.rows = dense, rows
        self.notes = {**self.notes, "command": _THEN.join(dict.fromkeys([*commands, self.notes["command"]]))}

    def find(self, method: str, recipe: Recipe) -> Row | None:
        """The row of a method with exactly this recipe."""
        same = (row for row in self.rows if row.method == method and row.recipe == recipe.to_dict())
        return next(same, None)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        content = {
            **self.notes,
            "setting": self.setting,
            "dense": self.dense,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def shown(measure: dict[str, Any], dense: dict[str, Any]) -> float:
    """The number to show of a measure."""
    return measure["value"] / dense["value"] if dense["relative"] else measure["value"]


def label(dense: dict[str, Any], text: str) -> str:
    """What that number is."""
    kind = f"{dense['name']} over dense" if dense["relative"] else dense["name"]
    return f"{kind}, {text} (dense: {dense['value']:.4g})"


def provenance(command: str) -> dict[str, Any]:
    """What a reader of a result file needs to measure it again."""
    return {
        "command": command,
        "machine": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "fips": json.loads(torch.ops.fips.build_info()),
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
