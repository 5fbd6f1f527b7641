"""Writing a directory or a file so that a reader sees the old one or the new one, whole."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside ``target``; on success it becomes ``target``, on any error it goes.

    Everything is on the disk before the old directory is touched. POSIX has no call that swaps two
    directories, so a crash between the two renames leaves the old one, complete, as ``.<name>.old-<id>``,
    from where :func:`clear_leftovers` brings it back.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    suffix = secrets.token_hex(4)
    new = target.with_name(f".{target.name}.new-{suffix}")
    old = target.with_name(f".{target.name}.old-{suffix}")
    new.mkdir()
    try:
        yield new
        _flush(new)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
        _flush_one(target.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(target: Path) -> None:
    """Undo what killed :func:`replaced_directory` left; only while nothing else writes ``target``."""
    target = target.resolve()
    name = glob.escape(target.name)
    for old in target.parent.glob(f".{name}.old-*"):
        if target.exists():
            shutil.rmtree(old)
        else:  # killed between the two renames
            old.rename(target)
    for new in target.parent.glob(f".{name}.new-*"):
        shutil.rmtree(new)


def replace_file(target: Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``target``; on any error the old file is untouched."""
    with replaced_file(target) as new:
        new.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replaced_file(target: Path, folder: Path | None = None) -> Iterator[Path]:
    """Yield a path beside ``target``; what is written there becomes it, or on any error goes.

    Args:
        folder: of that path instead, on the same file system: for writers that leave files of other names
            when they are killed.
    """
    target = target.resolve()
    new = (folder or target.parent) / f".{target.name}.new-{secrets.token_hex(4)}"
    try:
        yield new
        _flush_one(new)
        new.replace(target)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _flush_one(target.parent)


def _flush(directory: Path) -> None:
    """Force ``directory`` and all in it to the disk."""
    for path in directory.rglob("*"):
        _flush_one(path)
    _flush_one(directory)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
