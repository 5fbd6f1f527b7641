"""Judging of goals, on made-up rows."""

from __future__ import annotations

import json
import math

import goals
import pytest
from goals import MISSED, NOT_MEASURED, Goal

SPEED = Goal("G0", "speed", "mlp", {"case": "a", "T": 1}, "ratio.dense", (1.0, 2.0, 3.0))
MEMORY = Goal("G0", "memory", "mlp", {"case": "a"}, "memory", (0.6, 0.4, None), at_most=True)
GRID = Goal("G0", "grid", "mlp", {}, "ratio.dense", (1.0, 2.0, 3.0), every=False)


def results(*rows: dict, **content: object) -> dict:
    return {"mlp": {"rows": list(rows), "machine": {"device": "a GPU"}, **content}}


def row(ratio: float, **keys: object) -> dict:
    return {"case": "a", "T": 1, "ratio": {"dense": ratio}, **keys}


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [(0.99, MISSED), (1.0, "must"), (1.9, "must"), (2.0, "good"), (3.5, "stretch")],
)
def test_the_highest_level_reached(ratio, verdict):
    found = goals.judge(SPEED, results(row(ratio)))
    assert (found.value, found.verdict) == (ratio, verdict)
    assert found.fails == (verdict == MISSED)


@pytest.mark.parametrize(("memory", "verdict"), [(0.61, MISSED), (0.6, "must"), (0.1, "good")])
def test_measures_that_must_stay_small(memory, verdict):
    assert goals.judge(MEMORY, results({"case": "a", "memory": memory})).verdict == verdict


def test_the_worst_row_counts():
    found = goals.judge(SPEED, results(row(3.0, dtype="x"), row(1.5, dtype="y"), row(0.1, T=2)))
    assert (found.value, found.verdict) == (1.5, "must")
    assert "worst of 2: a y T=1" in found.note
    memory = goals.judge(MEMORY, results({"case": "a", "memory": 0.1}, {"case": "a", "memory": 0.5}))
    assert memory.value == 0.5


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({}, "no mlp.json"),
        (results(row(5.0), dry_run=True), "mlp.json is of a dry run"),
        (results(row(5.0, T=2)), "no such case"),
        (results(row(5.0, T=2), quick=True), "no such case in a quick run"),
        (results({"case": "a", "T": 1, "error": "boom"}), "error: boom"),
        (results({"case": "a", "T": 1, "skipped": "late"}), "skipped: late"),
        (results(row(5.0), {"case": "a", "T": 1, "r": 4, "error": "boom"}), "error: boom"),
        (results(row(math.nan)), "no ratio.dense"),
        (results({"case": "a", "T": 1, "ratio": {}, "rival_errors": {"dense": "no"}}), "dense: no"),
        (results({"case": "a", "T": 1, "ratio": {}, "dense_error": "no"}), "dense: no"),
        (results({"case": "a", "T": 1, "rival_errors": {"bsr": "no"}}), "no ratio.dense (bsr: no)"),
    ],
)
def test_what_is_not_measured_says_why(found, reason):
    verdict = goals.judge(SPEED, found)
    assert (verdict.value, verdict.verdict) == (None, NOT_MEASURED)
    assert reason in verdict.note
    assert not verdict.fails


def test_a_case_that_failed_in_a_later_part_was_measured():
    found = goals.judge(SPEED, results(row(2.5, r=4), {"case": "a", "T": 1, "error": "boom"}))
    assert (found.value, found.verdict) == (2.5, "good")


def test_a_grid_counts_what_it_lost():
    lost = ({"case": "b", "error": "boom"}, {"case": "c", "skipped": "late"})
    found = goals.judge(GRID, results(row(2.5), *lost))
    assert (found.value, found.note) == (2.5, "2 more failed or skipped")
    assert goals.judge(GRID, results(*lost)).verdict == NOT_MEASURED


def test_every_gpu_goal_of_the_list_is_there():
    found = {goal.id for goal in goals.GOALS}
    assert found == {f"G{i}" for i in (*range(1, 13), 15, 16, 17)}
    parts = [(goal.id, goal.part) for goal in goals.GOALS]
    assert len(set(parts)) == len(parts)
    for goal in goals.GOALS:
        levels = [level for level in goal.levels if level is not None]
        assert levels == sorted(levels, reverse=goal.at_most), goal


def test_files_and_exit_codes(tmp_path, capsys):
    path = tmp_path / "shared_mlp.json"
    (tmp_path / "unrelated.json").write_text("[1]")
    case = {"case": "DeiT-B", "T": 12608, "a": 0.5, "density": 0.25, "ratio": {"dense": 1.0}}
    case |= {"dtype": "bfloat16", "encoding": "block", "default_block": True}
    content = {"benchmark": "shared_mlp", "machine": {"device": "a GPU", "torch": "2"}, "rows": [case]}
    path.write_text(json.dumps(content))
    assert goals.main([str(tmp_path)]) == 0
    assert goals.main([str(tmp_path), "--strict"]) == 1
    table = (tmp_path / "goals.md").read_text()
    assert table in capsys.readouterr().out
    assert "| G7 | DeiT-B batch 64: over dense | 1 | 1.7 | 2.2 | 2.8 | MISSED |" in table
    written = json.loads((tmp_path / "goals.json").read_text())
    assert len(written) == len(goals.GOALS)
    assert {"goal": "G7", "verdict": "missed", "value": 1.0}.items() <= next(
        entry for entry in written if entry["value"] is not None
    ).items()
    case["ratio"]["dense"] = 9.0
    path.write_text(json.dumps(content))
    assert goals.main([str(tmp_path), "--strict"]) == 0
