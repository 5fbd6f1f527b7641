"""Finished groups on disk: taken as they are, refused if of another run, redone where damaged."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fips_ext import Journal, Recipe, compress
from fips_ext._atomic import clear_leftovers, replaced_directory
from fips_ext.errors import CheckpointError, InvalidArgument
from fips_ext.fingerprint import Fingerprint, of_model

from .tiny_llama import tiny_llama
from .tiny_models import build

pytestmark = pytest.mark.usefixtures("single_thread")

FILES = {
    "lock",
    "scratch",
    "inputs.json",
    *(f"group-000{i}.{end}" for i in (0, 1) for end in ("json", "safetensors")),
}


class Stopped(Exception):
    """What stands for a kill."""


def run(folder: Path, stop_at: int | None = None, name: str = "vit", **fields) -> tuple[nn.Module, int]:
    """A compression of two groups in one journal, and the steps it took; stopped at one of them."""
    torch.manual_seed(0)
    model, x = build(name)
    settings = {"pattern": "bitmap:16x16", "group_size": 2, "steps": 3, "calibration_tokens": 96}
    steps = 0

    def progress(done: int, _total: int) -> None:
        nonlocal steps
        steps += 1
        if steps == stop_at:
            raise Stopped

    with Journal(folder) as journal:
        recipe = Recipe(**{"ratio": 0.8, **settings, **fields})
        compress(model, recipe, [x] * 8, progress=progress, journal=journal)
    return model, steps


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "fields", [{}, {"bits": 4}, {"distill_steps": 2}, {"bits": 8, "distill_steps": 2}, {"base": "shared"}]
)
def test_a_stopped_run_ends_as_any_other(tmp_path, fields):
    expected, steps = run(tmp_path / "whole", **fields)
    assert {path.name for path in (tmp_path / "whole").iterdir()} == FILES
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", steps - 1 if fields.get("distill_steps") else steps - 2, **fields)
    assert (tmp_path / "stopped" / "group-0000.json").exists()
    found, _ = run(tmp_path / "stopped", **fields)
    assert equal(found, expected)
    again, fewer = run(tmp_path / "stopped", **fields)
    assert equal(again, expected)
    assert fewer < steps


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"ratio": 0.7}, "another recipe;"),
        ({"seed": 1}, "another recipe and another calibration;"),
        ({"name": "llama"}, "another model and another calibration;"),
    ],
)
def test_refuses_groups_of_another_run(tmp_path, changes, what):
    run(tmp_path / "work")
    before = contents(tmp_path / "work")
    with pytest.raises(InvalidArgument, match=what):
        run(tmp_path / "work", **changes)
    assert contents(tmp_path / "work") == before


def test_refuses_another_number_of_threads(tmp_path):
    run(tmp_path / "work")
    torch.set_num_threads(2)
    try:
        with pytest.raises(InvalidArgument, match="another number of threads;"):
            run(tmp_path / "work")
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("damage", ["cut", "flipped", "no structure", "no JSON", "other names", "gone"])
def test_a_damaged_group_is_computed_again(tmp_path, damage):
    expected, _ = run(tmp_path / "work")
    weights, structure = (tmp_path / "work" / f"group-0001.{end}" for end in ("safetensors", "json"))
    data = bytearray(weights.read_bytes())
    if damage == "cut":
        weights.write_bytes(data[:-8])
    elif damage == "flipped":
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "gone":
        weights.unlink()
    elif damage == "no JSON":
        structure.write_text("{")
    else:
        document = json.loads(structure.read_text())
        change = {"structure": {}} if damage == "no structure" else {"names": ["another"]}
        structure.write_text(json.dumps({**document, **change}))
    found, _ = run(tmp_path / "work")
    assert equal(found, expected)
    assert len(weights.read_bytes()) == len(data)


def test_groups_of_another_run_are_not_taken(tmp_path):
    """As on a node whose folder nobody cleared."""
    expected, _ = run(tmp_path / "new", ratio=0.7)
    run(tmp_path / "old")
    (tmp_path / "old" / "inputs.json").write_bytes((tmp_path / "new" / "inputs.json").read_bytes())
    found, _ = run(tmp_path / "old", ratio=0.7)
    assert equal(found, expected)


def test_without_groups_anything_may_begin(tmp_path, monkeypatch):
    def stop(*_arguments: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "store", stop)
        with pytest.raises(Stopped):
            run(tmp_path / "work")
    assert not (tmp_path / "work").exists()
    run(tmp_path / "work", ratio=0.7)


def test_the_config_counts(tmp_path):
    """Weights alone do not say what a model computes."""

    def fingerprint(**changes) -> str:
        torch.manual_seed(0)
        return of_model(tiny_llama(**changes))

    assert fingerprint() == fingerprint()
    assert fingerprint() != fingerprint(rope_theta=500.0)
    assert fingerprint() != fingerprint(hidden_act="gelu")


def test_fingerprints_of_what_models_are_given():
    def of(*values: object) -> str:
        return Fingerprint().add(values).hexdigest()

    class Anything:
        pass

    long = np.arange(10_000)
    other = long.copy()
    other[5000] = 0  # where numpy's repr has dots
    values = [1, 1.0, True, "1", None, torch.tensor(1), torch.tensor([1]), long, other, {"a": 1}, {"b": 1}]
    found = [of(value) for value in values] + [of(1, 2), of([1, 2])]
    assert len(set(found)) == len(found)
    assert of(long) == of(long.copy())
    assert of(Anything()) == of(Anything())
    assert of(torch.ones(4, 2).t()) == of(torch.ones(2, 4))


def test_damaged_inputs_are_an_error(tmp_path):
    run(tmp_path / "work")
    (tmp_path / "work" / "inputs.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"inputs.json: damaged; delete .*work to begin anew"):
        run(tmp_path / "work")


def test_one_process_at_a_time(tmp_path):
    with Journal(tmp_path / "work"), pytest.raises(InvalidArgument, match="another process works in"):
        Journal(tmp_path / "work")
    with Journal(tmp_path / "work"):
        pass


def _hold(folder: Path, ready: multiprocessing.Event) -> None:
    with Journal(folder):
        ready.set()
        signal.pause()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "work", ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(InvalidArgument, match="another process works in"):
        Journal(tmp_path / "work")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with Journal(tmp_path / "work"):
        pass


def test_processes_of_a_job_share_it(tmp_path):
    first = Journal(tmp_path / "work")
    with pytest.raises(InvalidArgument, match="another process works in"):
        Journal(tmp_path / "work", joined=True)
    first.share()
    second = Journal(tmp_path / "work", joined=True)
    with pytest.raises(InvalidArgument, match="another process works in"):
        Journal(tmp_path / "work")
    (tmp_path / "work" / "group-0000.json").write_text("{}")  # something that is kept
    first.close()
    with pytest.raises(InvalidArgument, match="another process works in"):
        Journal(tmp_path / "work")  # one of the job still lives
    second.close()
    Journal(tmp_path / "work").close()


def test_an_empty_journal_leaves_no_folder(tmp_path):
    with Journal(tmp_path / "work"):
        assert (tmp_path / "work").exists()
    assert not (tmp_path / "work").exists()


def test_discard_deletes_it_all(tmp_path):
    run(tmp_path / "work")
    with Journal(tmp_path / "work") as journal:
        assert journal.finished() == 2
        journal.discard()
    assert not (tmp_path / "work").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(InvalidArgument, match=r"holds 'photo.jpg', which no compression wrote"):
        Journal(tmp_path)
    with pytest.raises(InvalidArgument, match="is a file"):
        Journal(tmp_path / "photo.jpg")
    assert (tmp_path / "photo.jpg").read_bytes() == b"mine"


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk does, to files above ``size``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_what_was_there(tmp_path):
    expected, _ = run(tmp_path / "whole")
    with (
        files_of_at_most(4096),
        pytest.raises(CheckpointError, match=rf"{os.strerror(errno.EFBIG)}.*make room.* 0 groups"),
    ):
        run(tmp_path / "work")
    assert not (tmp_path / "work").exists()  # no group was finished
    found, _ = run(tmp_path / "work")
    assert equal(found, expected)


@pytest.mark.parametrize("name", ["out", "run[1]", "a*"])
def test_leftovers_of_killed_writes_are_undone(tmp_path, name):
    target = tmp_path / name
    with replaced_directory(target) as new:
        (new / "a").write_text("first")
    target.rename(tmp_path / f".{name}.old-1234")  # killed between the two renames
    (tmp_path / f".{name}.new-1234").mkdir()
    (tmp_path / ".run1.new-1234").mkdir()
    clear_leftovers(target)
    assert (target / "a").read_text() == "first"
    assert {path.name for path in tmp_path.iterdir()} == {name, ".run1.new-1234"}
    (tmp_path / f".{name}.old-5678").mkdir()
    clear_leftovers(target)
    assert {path.name for path in tmp_path.iterdir()} == {name, ".run1.new-1234"}
