"""The loader on the committed corpus, on mutations of sound files, and on bytes that hypothesis makes up."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .hostile import HostileCheckpoint, mutations

pytestmark = pytest.mark.usefixtures("single_thread")

CORPUS = Path(__file__).parent / "corpus" / "checkpoint"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> HostileCheckpoint:
    return HostileCheckpoint(tmp_path_factory.mktemp("hostile"))


def test_what_is_sound_is_accepted(checkpoint) -> None:
    before = checkpoint.accepted
    for seed in checkpoint.seeds():
        checkpoint.read(seed)
    assert checkpoint.accepted == before + len(checkpoint.seeds())


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_the_corpus(checkpoint, path) -> None:
    checkpoint.read(path.read_bytes())


def test_mutations_of_sound_files(checkpoint) -> None:
    before = checkpoint.refused
    for data in mutations(checkpoint.seeds(), 400):
        checkpoint.read(data)
    assert checkpoint.refused > before + 200


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.binary(max_size=200))
def test_any_bytes(checkpoint, data: bytes) -> None:
    checkpoint.read(data)
