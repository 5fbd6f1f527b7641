"""The serving loop of the soak test, by a clock of its own: what it counts, and that it sees what grows."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from . import soak


@pytest.mark.parametrize("leak", [0, 2**20])
def test_it_counts_and_sees_what_grows(monkeypatch, leak: int) -> None:
    clock, sizes = itertools.count(0, 2), itertools.count(2**30, leak)  # a request takes two seconds
    monkeypatch.setattr(soak, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(soak.memory, "resident", lambda: next(sizes))
    found = soak.serve(minutes=0.1, every=1)
    assert found["requests"] == 2
    assert found["tokens"] >= 2
    assert found["resident"] == 2**30 + leak
    assert found["growth"] == leak
