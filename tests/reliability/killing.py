"""Kills `fips compress` at random moments and at every step of its writing, and lets it go on.

Each run is a fork of one process that has imported everything and computed nothing: a second instead of ten.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.tiny_llama import save_text, save_tiny_llama

# Whatever changes the file system is one of these in the end.
_WRITING = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


class Command:
    """`fips compress` of a tiny random Llama in a folder, and what a run without a kill ends in."""

    def __init__(self, folder: Path, *options: str) -> None:
        import fips_ext._compress
        import fips_ext.checkpoint
        import fips_ext.cli  # noqa: F401  imported before any fork

        self.folder, self.model = folder, folder / "model"
        save_tiny_llama(self.model)
        save_text(folder / "text.txt")
        self.options = [
            *("--calib", str(folder / "text.txt"), "--tokens", "512", "--group-size", "1"),
            *("--ratio", "0.6", "--steps", "4", *options),
        ]
        start = time.monotonic()
        if self.run(folder / "reference") != 0:
            raise AssertionError("the run without a kill failed")
        self.seconds = time.monotonic() - start
        self.expected = tensors_of(folder / "reference")

    def run(self, out: Path, after: float | None = None, at: tuple[int, bool] | None = None) -> int:
        """The exit code of one run into ``out``, negative where it was killed.

        Args:
            after: seconds, to be killed then.
            at: a step of writing, counted from 0, and whether it is killed before it or after it.
        """
        child = os.fork()
        if child == 0:
            status = 70
            try:
                status = self._child(out, at)
            finally:
                os._exit(status)
        if after is not None:
            _wait(child, after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def check(self, out: Path) -> None:
        """Raise unless ``out`` is what a run without a kill ends in, and nothing else was left."""
        if tensors_of(out) != self.expected:
            raise AssertionError(f"{out}: other tensors than a run without a kill")
        left = [p.name for p in out.parent.iterdir() if p.name != out.name]
        if left:
            raise AssertionError(f"{out}: beside it were left {left}")

    def is_done(self, out: Path) -> bool:
        """Whether a killed run had come to its end: the checkpoint is there, and nothing to go on from."""
        return out.exists() and not (out.parent / f"{out.name}.partial" / "inputs.json").exists()

    def finish(self, out: Path, status: int) -> None:
        """Raise unless a run ended well; after one killed at its very end, the next clears up and refuses."""
        if status < 0:
            status = self.run(out)
            said = (self.folder / "stderr.txt").read_text()
            if status == 1 and "is not empty" in said:
                return
        if status != 0:
            said = (self.folder / "stderr.txt").read_text()
            raise AssertionError(f"exit code {status}: {said[-2000:]}")

    def _child(self, out: Path, at: tuple[int, bool] | None) -> int:
        import torch

        from fips_ext.cli import app

        torch.set_num_threads(1)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        log = os.open(self.folder / "stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 2)
        with killed_at(*at) if at is not None else contextlib.nullcontext():
            try:
                app(["compress", str(self.model), "--out", str(out), *self.options])
            except SystemExit as stop:
                return int(stop.code or 0)
        return 0


@contextlib.contextmanager
def killed_at(step: int, before: bool) -> Iterator[None]:
    """Within it, this process kills itself at one step of its writing."""
    count = 0

    def counted(call: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            nonlocal count
            now, count = count, count + 1
            if now == step and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            if now == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapper

    real = {name: getattr(os, name) for name in _WRITING}
    try:
        for name, call in real.items():
            setattr(os, name, counted(call))
        yield
    finally:
        for name, call in real.items():
            setattr(os, name, call)


def tensors_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint but the report, which holds times."""
    found = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        if path.name == "fips.json":
            document = json.loads(data)
            for layer in document["report"]["layers"]:
                layer["seconds"] = 0
            document["report"]["seconds"] = document["report"]["peak_memory"] = 0
            data = json.dumps(document).encode()
        found[path.name] = hashlib.sha256(data).hexdigest()
    return found


def kill_at_random(command: Command, kills: int, seed: int = 0) -> dict[str, int]:
    """Runs killed at random moments until ``kills`` is reached and the last one is done."""
    generator = random.Random(seed)
    counts = {"kills": 0, "checkpoints": 0}
    while counts["kills"] < kills:
        out = command.folder / "random" / "out"
        out.parent.mkdir()
        done = False
        while not done:
            status = command.run(out, after=generator.uniform(0, 1.1 * command.seconds))
            done = status >= 0 or command.is_done(out)
            counts["kills"] += status < 0
        command.finish(out, status)
        command.check(out)
        counts["checkpoints"] += 1
        shutil.rmtree(out.parent)
    return counts


def kill_at_every_step(command: Command, stride: int = 1) -> dict[str, int]:
    """Runs killed before and after each ``stride``-th step of writing, each continued once."""
    counts = {"kills": 0, "checkpoints": 0}
    step = 0
    while True:
        for before in (True, False):
            out = command.folder / "steps" / "out"
            out.parent.mkdir()
            status = command.run(out, at=(step, before))
            if status == 0:  # it has fewer steps
                command.check(out)
                shutil.rmtree(out.parent)
                return counts
            if status != -signal.SIGKILL:
                command.finish(out, status)
            counts["kills"] += 1
            command.finish(out, status if command.is_done(out) else command.run(out))
            command.check(out)
            counts["checkpoints"] += 1
            shutil.rmtree(out.parent)
        step += stride


def _wait(child: int, seconds: float) -> None:
    """Until ``seconds`` are over or the child has ended, whichever comes first."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="empty, for the runs")
    parser.add_argument("--stride", type=int, default=1, help="kill at each so many-th step of writing")
    parser.add_argument("--random", type=int, default=50, help="kills at random moments")
    arguments, options = parser.parse_known_args()
    command = Command(arguments.folder, *options)
    steps = kill_at_every_step(command, arguments.stride)
    moments = kill_at_random(command, arguments.random)
    print(json.dumps({name: steps[name] + moments[name] for name in steps}))


if __name__ == "__main__":
    main()
