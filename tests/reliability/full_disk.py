"""Compresses onto disks of every size up to what is needed: what was there stays, and with room it goes on.

A disk is a file system in memory where that may be mounted (as root on Linux); elsewhere files may not grow
above a size, which is what one full disk looks like to one writer.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .killing import Command, tensors_of

_STEPS = 12


def fill_up(folder: Path) -> dict[str, int]:
    command = Command(folder, "--bits", "8")
    needed = 3 * sum(path.stat().st_size for path in (folder / "reference").iterdir())
    counts = {"full disks": 0, "continued with room, bit-identical": 0}
    for step in range(1, _STEPS):
        place = folder / "disk"
        place.mkdir()
        with disk_of(place, needed * step // _STEPS) as make_room:
            if not fits(command, place / "out"):
                counts["full disks"] += 1
                make_room()
                assert fits(command, place / "out")
                counts["continued with room, bit-identical"] += 1
        shutil.rmtree(place)
    assert counts["full disks"] > 3
    return counts


def fits(command: Command, out: Path) -> bool:
    """Whether a run has room; it must end as any other, or leave nothing in its place and say why."""
    status = command.run(out)
    said = (command.folder / "stderr.txt").read_text()
    if status == 0:
        assert tensors_of(out) == command.expected
        return True
    assert status == 1, f"exit code {status}: {said}"
    assert "Traceback" not in said, said
    assert not out.exists()
    return False


@contextlib.contextmanager
def disk_of(place: Path, size: int) -> Iterator:
    """Within it ``place`` has room for ``size`` bytes, until what is yielded is called."""
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if subprocess.run(mounted, capture_output=True).returncode == 0:
        try:
            yield lambda: subprocess.run(
                ["mount", "-o", "remount,size=1G", str(place)], check=True, capture_output=True
            )
        finally:
            subprocess.run(["umount", str(place)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(1024, size // 4), before[1]))
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def main() -> None:
    print(json.dumps(fill_up(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
