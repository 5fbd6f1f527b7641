"""A run that is killed goes on and ends as any other: a few kills here, every one by `make reliability`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("options", [[], ["--bits", "4", "--distill-steps", "2"]])
def test_killed_runs_go_on(tmp_path: Path, options: list[str]) -> None:
    """In a process of its own, which has no threads yet when it forks."""
    arguments = [str(tmp_path), "--stride", "9", "--random", "4", *options]
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.killing", *arguments],
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["kills"] >= 10
    assert counts["checkpoints"] >= 7
