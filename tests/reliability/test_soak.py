"""The serving loop of the soak test, for seconds: what it counts, and that it ends."""

from __future__ import annotations

from .soak import serve


def test_it_serves_and_counts() -> None:
    found = serve(minutes=0.1)
    assert 0 < found["requests"] < found["tokens"]
    assert 0 <= found["growth"] <= found["resident"]
