"""``fips doctor``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from .console import JsonOption, print_json, stdout

_STYLES = {"ok": "green", "missing": "yellow", "broken": "red"}


def doctor(
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="A checkpoint folder to check, too.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What this installation can do, what it lacks, and whether its kernels compute what they should.

    With a checkpoint: its files, its numbers, and its ops against the oracle, layer by layer. Ends with 1 if
    something is broken; what is optional may be missing.

    Examples:

    - `fips doctor`
    - `fips doctor small --json`
    """
    from ..diagnosis import State, diagnose, examine

    findings = diagnose()
    if directory is not None:
        findings.append(examine(directory))
    broken = any(finding.state is State.BROKEN for finding in findings)
    if as_json:
        print_json({"sound": not broken, "findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        table = Table("", "", "found", "cure", show_header=False, box=None)
        for finding in findings:
            state = finding.state.value
            shown = Text(state, style=_STYLES[state])  # as text: extras in brackets are no markup
            table.add_row(Text(finding.name), shown, Text(finding.detail), Text(finding.cure))
        stdout().print(table)
    if broken:
        raise typer.Exit(1)
