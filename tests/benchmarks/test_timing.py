"""Races on made-up times, and the timing of a GPU on a made-up one whose clock the runners move."""

from __future__ import annotations

import contextlib
import json
import math
import types

import gpu_timing
import pytest
import torch
from gpu_timing import Bench
from race import Race, measured


def test_ratios_are_medians_over_rounds_of_the_fastest_form():
    race = Race({"ours": [1.0, 2.0, 1.0], "dense": [3.0, 4.0, 9.0], "dense/merged": [5.0, 2.0, 4.0]})
    assert race.rivals() == ["dense"]
    assert race.ratio("dense") == 3.0  # of 3, 1, 4
    row = race.row()
    assert row["seconds"] == {"ours": 1.0, "dense": 4.0, "dense/merged": 4.0}
    assert row["ratio"] == {"dense": 3.0}
    assert row["rounds"] == 3
    assert "rival_errors" not in row


def test_the_fastest_of_several_rivals_counts():
    race = Race({"ours": [1.0, 1.0], "dense": [3.0, 3.0], "filled": [2.0, 4.0]}, {"other": "boom"})
    assert race.ratio("dense", "filled") == 2.5
    assert race.row()["rival_errors"] == {"other": "boom"}


def test_rivals_that_failed_have_no_ratio():
    race = Race({"ours": [1.0, 2.0]}, {"dense": "boom"})
    assert race.rivals() == []
    for rivals in (("dense",), ("dense", "filled"), ()):
        assert math.isnan(race.ratio(*rivals))
        assert math.isnan(race.spread(*rivals))
    row = measured(race.row() | {"e": race.ratio("dense") * 0.5, "layers": 2})
    assert row["ratio"] == {}
    assert row["rival_errors"] == {"dense": "boom"}
    assert row["layers"] == 2
    assert "e" not in row


def test_layers_share_a_call():
    race = Race({"ours": [4.0], "dense": [8.0]}).per_item(4)
    assert race.seconds() == 1.0
    assert race.ratio("dense") == 2.0


def test_wrong_results_are_errors():
    x = torch.randn(8)
    assert gpu_timing.check_close(x, x) == 0
    for wrong in (x + 1, x * float("nan")):
        with pytest.raises(ValueError, match="wrong result"):
            gpu_timing.check_close(wrong, x)


class Gpu:
    """Stands in for torch.cuda: events read a clock that only runners move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.captures = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.time = gpu.now

            def elapsed_time(self, end: Event) -> float:
                return (end.time - self.time) * 1e3

        class Stream:
            def wait_stream(self, stream: Stream) -> None:
                pass

        class CUDAGraph:
            def replay(self) -> None:
                self.run()

        self.Event, self.Stream, self.CUDAGraph = Event, Stream, CUDAGraph
        self.capturing: CUDAGraph | None = None

    def is_available(self) -> bool:
        return True

    def get_device_properties(self, device: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(name="a GPU", major=9, minor=0, multi_processor_count=2, L2_cache_size=1)

    def synchronize(self) -> None:
        pass

    empty_cache = synchronize

    def current_stream(self) -> object:
        return self.Stream()

    def stream(self, stream: object) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph):
        self.captures += 1
        before = self.now
        yield
        took = self.now - before
        graph.run = lambda: self.spend(took)

    def spend(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    for name in vars(gpu).keys() | vars(Gpu).keys():
        if hasattr(torch.cuda, name) and not name.startswith("_"):
            monkeypatch.setattr(torch.cuda, name, getattr(gpu, name))
    monkeypatch.setattr(Bench, "_copy_rate", lambda self: 4e12)
    monkeypatch.setattr(gpu_timing, "warm_seconds", lambda run: (run(), 1e-3)[1])
    return gpu


@pytest.fixture
def bench(gpu, tmp_path):
    bench = Bench("doc", "mlp", 60.0, ["--out", str(tmp_path / "mlp.json")])
    bench.device = "cpu"
    return bench


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("flush", [False, True])
def test_a_race_on_a_gpu(gpu, bench, graph, flush):
    runs = {"ours": lambda: gpu.spend(1.0), "dense": lambda: gpu.spend(3.0), "bad": lambda: 1 / 0}
    race = bench.race(runs, graph=graph, flush=flush)
    assert race.seconds() == pytest.approx(1.0)
    assert race.ratio("dense") == pytest.approx(3.0)
    assert race.rivals() == ["dense"]
    assert "ZeroDivisionError" in race.errors["bad"]
    assert gpu.captures == (2 if graph else 0)


def test_layers_outgrow_the_l2(bench):
    assert bench.layers(2**20) == 256
    assert bench.layers(2**40) == 2
    bench.machine["l2_bytes"] = 126 * 2**20
    assert bench.layers(2**20) == 3 * 126
    assert bench.layers(1) == gpu_timing.MAX_LAYERS


def test_ours_must_not_fail(gpu, bench):
    with pytest.raises(ZeroDivisionError):
        bench.race({"ours": lambda: 1 / 0, "dense": lambda: gpu.spend(1.0)})


def test_short_calls_are_timed_in_batches(gpu, bench, monkeypatch):
    monkeypatch.setattr(gpu_timing, "warm_seconds", lambda run: 1e-5)
    calls = []
    race = bench.race({"ours": lambda: calls.append(gpu.spend(1e-5))})
    assert len(calls) == gpu_timing.MAX_ROUNDS * 20
    assert race.seconds() == pytest.approx(1e-5)


def test_rows_and_errors_reach_the_file(gpu, bench, tmp_path):
    def measure():
        yield bench.race({"ours": lambda: gpu.spend(1.0), "dense": lambda: gpu.spend(2.0)}).row()

    bench.attempt({"case": "right"}, measure)
    bench.attempt({"case": "wrong"}, lambda: 1 / 0)
    assert bench.finish() == 1
    content = json.loads((tmp_path / "mlp.json").read_text())
    assert content["machine"]["capability"] == 90
    assert content["dry_run"] is False
    right, wrong = content["rows"]
    assert right["ratio"] == {"dense": 2.0}
    assert wrong["error"].startswith("ZeroDivisionError")
