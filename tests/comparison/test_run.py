"""Comparisons: equal bytes for every method, and nothing measured twice."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from fips_ext import Recipe, calibrate, compress
from fips_ext.comparison import Cell, Results, Settings, methods_of, run_cells
from fips_ext.comparison.plot import plot
from fips_ext.errors import InvalidArgument
from fips_ext.train import batches_for

from ..tiny_models import build

pytestmark = pytest.mark.usefixtures("single_thread")

TOKENS = 96
COMMON = {"steps": 3, "tokens_per_step": 32, "calibration_tokens": TOKENS}
METHODS = methods_of(["bitmap:16x16", "block:16x16"])


class Bench:
    """A model, its calibration, and an evaluation that counts its calls."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.model, self.x = build("llama")
        self.model.to(dtype)
        with torch.no_grad():
            self.expected = self.model(self.x).logits
        self.calls = 0
        self.data = [self.x] * 8
        self.calibration = calibrate(self.model, self.data, TOKENS, keep_batches=batches_for(2))

    def evaluate(self, model) -> dict:
        self.calls += 1
        with torch.no_grad():
            error = (model(self.x).logits - self.expected).float().square().mean()
        return {"x": {"name": "error", "value": float(error), "relative": False}}

    def run(self, path: Path, methods=METHODS, ratios=(0.8,), command="first", every_stage=True, **common):
        self.results = Results(path, {"model": "llama"}, {"command": command})
        settings = Settings(
            {**COMMON, **common}, self.evaluate, lambda *_: {"decode_ratio": 1.5}, every_stage=every_stage
        )
        cells = [Cell(method, ratio) for ratio in ratios for method in methods]
        self.notes: list[str] = []
        return run_cells(self.model, cells, self.data, settings, self.results, note=self.notes.append)


def test_every_method_spends_the_same_bytes(tmp_path: Path) -> None:
    rows = Bench().run(tmp_path / "r.json")
    assert [row.method for row in rows] == [method.name for method in METHODS]
    for row in rows:
        assert 0.6 < row.mlp_ratio <= 0.8  # a rank is a multiple of the block
        assert set(row.quality) == set(row.seconds) == {"closed form", "trained"}
        assert row.last == row.quality["trained"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cell_is_what_compress_gives(tmp_path: Path, dtype: torch.dtype) -> None:
    bench = Bench(dtype)
    common = {"distill_steps": 2, "distill_learning_rate": 0.001}
    state = copy.deepcopy(bench.model.state_dict())
    (row,) = bench.run(tmp_path / "r.json", METHODS[:1], **common)
    assert all(torch.equal(value, state[name]) for name, value in bench.model.state_dict().items())
    model = copy.deepcopy(bench.model)
    compress(model, Recipe.from_dict(row.recipe), bench.calibration)
    assert bench.evaluate(model) == row.quality["distilled"]
    fewer = copy.deepcopy(bench.model)
    compress(fewer, Recipe.from_dict({**row.recipe, "distill_steps": 0}), bench.calibration)
    assert bench.evaluate(fewer) == row.quality["trained"]
    start = copy.deepcopy(bench.model)
    compress(start, Recipe.from_dict({**row.recipe, "distill_steps": 0, "steps": 0}), bench.calibration)
    assert bench.evaluate(start) == row.quality["closed form"]


@pytest.mark.parametrize(
    ("stages", "last"),
    [
        ({"steps": 0}, "closed form"),
        ({"distill_steps": 0}, "trained"),
        ({"distill_steps": 2, "distill_learning_rate": 0.001}, "distilled"),
    ],
)
def test_can_look_at_the_last_stage_alone(tmp_path: Path, stages: dict, last: str) -> None:
    bench = Bench()
    (every,) = bench.run(tmp_path / "every.json", METHODS[:1], **stages)
    calls = bench.calls
    (one,) = bench.run(tmp_path / "one.json", METHODS[:1], every_stage=False, **stages)
    assert bench.calls == calls + 2  # the dense model, and once
    assert one.quality == {last: every.quality[last]}
    assert set(one.seconds) == set(every.seconds)


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    bench, path = Bench(), tmp_path / "r.json"
    first = bench.run(path, METHODS[:2])
    calls = bench.calls
    bench.data = None  # not looked at
    assert bench.run(path, METHODS[:2]) == first
    assert bench.calls == calls
    bench.data = [bench.x] * 8
    rows = bench.run(path, METHODS[:3], command="second")
    assert rows[:2] == first
    assert bench.notes == [f"{METHODS[2].name} at 0.8 (3 of 3)"]
    assert json.loads(path.read_text())["command"] == "first && second"
    assert bench.run(path, METHODS[:1], steps=1)[0].recipe["steps"] == 1  # another recipe is another row
    assert len(json.loads(path.read_text())["rows"]) == 4


def test_a_ratio_out_of_reach_is_left_out(tmp_path: Path) -> None:
    bench = Bench()
    rows = bench.run(tmp_path / "r.json", METHODS[:1], ratios=(0.8, 0.01))
    assert [row.ratio for row in rows] == [0.8]
    assert bench.notes[-1].startswith("left out: ratio: got 0.01")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"setting": {}, "dense": null, "rows": [{}]}'])
def test_refuses_a_file_of_something_else(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(InvalidArgument, match="not a result file"):
        Results(path, {}, {})
    assert path.read_text() == content


def test_refuses_results_of_another_setting(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    Results(path, {"model": "a", "dtype": "float32"}, {"command": "c"}).save()
    with pytest.raises(InvalidArgument, match=r"another setting \(model differ\)"):
        Results(path, {"model": "b", "dtype": "float32"}, {})


def test_plot_of_one_stage_without_speed(tmp_path: Path) -> None:
    bench = Bench()
    bench.run(tmp_path / "r.json", METHODS[-2:], steps=0)
    rows = bench.results.rows
    plot(bench.results, rows, "x", tmp_path / "plot.svg")
    drawing = (tmp_path / "plot.svg").read_text()
    assert "</svg>" in drawing


def test_methods_are_named_once() -> None:
    methods = methods_of(["bitmap", "block:32x32", "block:64x64"])
    names = [method.name for method in methods]
    assert len(set(names)) == len(names) == 10
    assert {method.family for method in methods} == {"bitmap", "block:32x32", "block:64x64", "low rank"}
    for method in methods:
        assert method.recipe(0.5, seed=3).seed == 3


def test_dense_is_no_pattern_of_a_comparison() -> None:
    with pytest.raises(InvalidArgument, match="low rank"):
        methods_of(["dense"])
