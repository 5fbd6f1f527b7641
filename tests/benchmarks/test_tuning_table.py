"""From measured times to thresholds to the header of the kernels."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tune
import tuning_table
from tuning_table import HEADER, PRESENT, Measurements, Tuning

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"


def test_densities_cross_between_the_points():
    # Ours 1 per unit of density, dense 0.6: they cross at 0.6.
    points = [(p, p, 0.6) for p in (0.5, 0.25, 0.8)]
    assert tuning_table.crossing(points) == pytest.approx(0.6)
    assert tuning_table.density_threshold(points, 0.65) == 0.6


def test_densities_stay_inside_what_can_be_measured():
    assert tuning_table.density_threshold([(0.25, 1, 2), (0.9, 1, 2)], 0.65) == 0.95  # ours always
    assert tuning_table.density_threshold([(0.05, 2, 1), (0.9, 2, 1)], 0.65) == 0.1  # never
    assert tuning_table.density_threshold([], 0.65) == 0.65


def test_tokens_from_which_dense_wins():
    assert tuning_table.tokens_threshold([(64, 3, 2), (8, 1, 2), (16, 1, 2)], 100) == 64
    assert tuning_table.tokens_threshold([(31, 1, 2), (63, 1, 2)], 100) == 128  # it never did
    assert tuning_table.tokens_threshold([(4096, 1, 2)], 100) == 4096
    assert tuning_table.tokens_threshold([], 100) == 100


def test_filling_is_timed_where_the_ops_fill_up():
    assert tune.fill_tokens(PRESENT) == tune.FILL_TOKENS
    assert tune.fill_tokens(dataclasses.replace(PRESENT, dense_tokens=1024)) == 1024
    assert tune.fill_tokens(dataclasses.replace(PRESENT, bitmap_dense_tokens=4096)) == 4096


def test_tiles_grow_only_past_what_was_slower():
    points = [(1.1, 3.0, 2.0), (1.5, 2.5, 2.0), (2.0, 1.9, 2.0), (3.0, 1.8, 2.0)]
    assert tuning_table.tiles_threshold(points, 1.0) == 2.0
    assert tuning_table.tiles_threshold(points[2:], 1.0) == 1.0
    assert tuning_table.tiles_threshold([], 1.5) == 1.5


def test_header_and_back():
    hopper = Tuning(90, 32, 128, 0.7, 0.35, 1.5)
    ampere = Tuning(80, 64, 64, 0.6, 0.3, 1.0)
    text = tuning_table.header([(hopper, "one."), (ampere, "other.")])
    assert tuning_table.parse(text) == {0: PRESENT, 80: ampere, 90: hopper}
    assert text.index("other.") < text.index("one.")
    with pytest.raises(ValueError, match="capabilities"):
        tuning_table.header([(hopper, "one."), (hopper, "two.")])


def test_measured_file_to_entry(tmp_path):
    rows = [
        {"threshold": "mm", "x": 0.5, "ours_s": 1.0, "other_s": 1.5},
        {"threshold": "mm", "x": 0.9, "ours_s": 2.0, "other_s": 1.5},
        {"case": "sddmm", "error": "boom"},
    ]
    present = {"capability": 0, "dense_tokens": 64, "bitmap_dense_tokens": 64}
    present |= {"mm_density": 0.65, "sddmm_density": 0.3, "tiles_per_sm": 1.0}
    content = {"machine": {"device": "a GPU", "capability": 90}, "present": present, "rows": rows}
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps(content))
    assert tuning_table.read(path) == (Tuning(90, 64, 64, 0.7, 0.3, 1.0), "a GPU.")
    assert tuning_table.measurements(content) == Measurements(
        90, [(0.5, 1.0, 1.5), (0.9, 2.0, 1.5)], [], [], [], []
    )
    path.write_text(json.dumps(content | {"dry_run": True}))
    with pytest.raises(ValueError, match="dry run"):
        tuning_table.read(path)


def test_the_committed_header_is_made_from_the_committed_files():
    entries = [tuning_table.read(path) for path in sorted(RESULTS.glob("*/tuning.json"))]
    assert HEADER.read_text() == tuning_table.header(entries)
    assert tuning_table.present_tuning(75) == PRESENT
