"""Finished groups of a compression on disk, so that one that was stopped goes on where it was.

A folder of

``lock``                     locked by the process that works here; the kernel lets go when it ends
``inputs.json``              fingerprints of all that the numbers depend on
``group-0000.safetensors``   the factors of a group, float32, not yet rounded to what the checkpoint stores
``group-0000.json``          its structure, errors and the SHA-256 of that file; written last
``scratch``                  a folder for files that end with the process

Every file appears whole or not at all. What is found damaged is computed again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import IO

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ._atomic import replace_file, replaced_file
from ._json import read_json
from .errors import CheckpointError, InvalidArgument
from .finished_group import FinishedGroup

_log = logging.getLogger(__name__)

_VERSION = 1
_INPUTS = "inputs.json"
_LOCK = "lock"
_SCRATCH = "scratch"


class Journal:
    """A folder of finished groups, for :func:`fips_ext.compress` to keep and to take from.

    Use it as a context manager, and call :meth:`discard` when the compressed model is saved:

        with Journal("small.partial") as journal:
            compress(model, recipe, data, journal=journal)
            save_pretrained(model, "small")
            journal.discard()

    Args:
        folder: made if it is not there.

        joined: a process of the job that has the folder already, see :mod:`~.distributed`.

    Raises:
        InvalidArgument: another process works in the folder, or it is something else.
        OSError: it cannot be written.
    """

    def __init__(self, folder: str | Path, *, joined: bool = False) -> None:
        self.folder = Path(folder)
        self._lock: IO[bytes] | None = None
        if joined:
            self.scratch.mkdir(parents=True, exist_ok=True)
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise InvalidArgument(f"journal: {self.folder} is a file; give a folder")
        self._lock = _locked(self.folder)
        strange = [path.name for path in self.folder.iterdir() if not _is_ours(path.name)]
        if strange:
            self.close()
            raise InvalidArgument(
                f"journal: {self.folder} holds {strange[0]!r}, which no compression wrote; give another"
            )
        for path in self.folder.glob(".*.new-*"):
            path.unlink()
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process work in the folder; one that holds nothing goes."""
        if self._lock is None or self._lock.closed:
            return
        if {path.name for path in self.folder.iterdir()} <= {_LOCK, _SCRATCH}:
            shutil.rmtree(self.folder)
        self._lock.close()

    def begin(self, inputs: dict[str, str]) -> None:
        """Say what the groups will be made of.

        Args:
            inputs: fingerprints by name.

        Raises:
            InvalidArgument: the groups that are here were made of something else.
            CheckpointError: what they were made of cannot be read.
        """
        path = self.folder / _INPUTS
        document = {"version": _VERSION, **inputs}
        if not path.exists():
            replace_file(path, json.dumps(document, indent=1))
            return
        try:
            found = read_json(path)
            changed = [name for name in document if found.get(name) != document[name]]
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); delete {self.folder} to begin anew") from error
        if changed:
            raise InvalidArgument(
                f"journal: {self.folder} holds groups of a run with another {' and another '.join(changed)}; "
                "give the same model, data and settings to go on with it, or delete it to begin anew"
            )

    @property
    def scratch(self) -> Path:
        """A folder for files that end with the process."""
        return self.folder / _SCRATCH

    def inputs(self) -> dict[str, str] | None:
        """What :meth:`begin` was given in an earlier run; None if it was never reached."""
        try:
            found = read_json(self.folder / _INPUTS)
            return {name: found[name] for name in found if name != "version"}
        except (OSError, ValueError, TypeError):
            return None

    def finished(self) -> int:
        """How many groups are kept."""
        return len(list(self.folder.glob("group-*.json")))

    def store(self, index: int, group: FinishedGroup) -> None:
        """Keep a group, durably.

        Raises:
            CheckpointError: the disk does not take it; the groups before it stay.
        """
        try:
            self._write(index, group)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.folder}: could not be written ({error}); make room, then give the same command "
                f"again: the {self.finished()} groups that are there are kept"
            ) from error

    def load(self, index: int, names: list[str]) -> FinishedGroup | None:
        """A group that was kept, or None.

        Args:
            names: of its MLPs.
        """
        if not self._path(index, "json").exists():
            return None
        try:
            return self._read(index, names)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, CheckpointError) as error:
            _log.warning("%s: damaged (%s); computed again", self._path(index, "json"), error)
            return None

    def discard(self) -> None:
        """Delete the folder: the model is saved."""
        for path in self.folder.glob("group-*"):
            path.unlink()
        # Killed before this, a run knows that it is done; after it, nothing is left that speaks of one.
        (self.folder / _INPUTS).unlink(missing_ok=True)
        shutil.rmtree(self.folder)
        self._lock.close()

    def _write(self, index: int, group: FinishedGroup) -> None:
        tensors, document = group.encode()
        with replaced_file(self._path(index, "safetensors")) as new:
            save_file(tensors, new)
            document["sha256"] = _sha256(new)
        replace_file(self._path(index, "json"), json.dumps(document))

    def _read(self, index: int, names: list[str]) -> FinishedGroup:
        document = read_json(self._path(index, "json"))
        weights = self._path(index, "safetensors")
        if document["names"] != names:
            raise ValueError(f"it is of {document['names']}")
        if _sha256(weights) != document["sha256"]:
            raise ValueError("its checksum differs")
        return FinishedGroup.decode(load_file(weights), document)

    def _path(self, index: int, kind: str) -> Path:
        return self.folder / f"group-{index:04d}.{kind}"


def _is_ours(name: str) -> bool:
    name = name.removeprefix(".").partition(".new-")[0]  # what a killed process was writing
    return name in (_LOCK, _INPUTS, _SCRATCH) or (
        name.startswith("group-") and name.endswith((".json", ".safetensors"))
    )


def _locked(folder: Path) -> IO[bytes]:
    """The open lock file of ``folder``, locked."""
    path = folder / _LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise InvalidArgument(
                f"journal: another process works in {folder}; wait for it, or give another folder"
            ) from error
        # A run that has just finished may have deleted the file between the two calls.
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                return lock
        lock.close()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()
