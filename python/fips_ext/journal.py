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
import glob
import hashlib
import json
import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from . import memory
from ._atomic import replace_file, replaced_file
from ._json import read_json
from ._tensor_files import map_tensors
from .errors import CheckpointError, InvalidArgument
from .finished_group import FinishedGroup

_log = logging.getLogger(__name__)

_VERSION = 1
_DAMAGE = (OSError, ValueError, KeyError, TypeError, SafetensorError, CheckpointError)
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
        request: says what was asked for, in words of the caller; see :meth:`request`.
        joined: a further process of a job, see :mod:`~.distributed`; the first one has called :meth:`share`.

    Raises:
        InvalidArgument: another run works in the folder, or it is something else.
        OSError: it cannot be written.
    """

    def __init__(self, folder: str | Path, *, request: str = "", joined: bool = False) -> None:
        self.folder = Path(folder).resolve()
        self._request, self._joined, self._run = request, joined, ""
        if self.folder.exists() and not self.folder.is_dir():
            raise InvalidArgument(f"journal: {self.folder} is a file; give a folder")
        self._lock = _locked(self.folder, fcntl.LOCK_SH if joined else fcntl.LOCK_EX)
        if joined:
            self.scratch.mkdir(exist_ok=True)
            return
        strange = [path.name for path in self.folder.iterdir() if not _is_ours(path.name)]
        if strange:
            self._lock.close()
            raise InvalidArgument(
                f"journal: {self.folder} holds {strange[0]!r}, which no compression wrote; give another"
            )
        for path in self.folder.glob(".*.new-*"):
            path.unlink()
        for path in self.folder.parent.glob(f".{glob.escape(self.folder.name)}.old-*"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(exist_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another run work in the folder; one without groups goes."""
        if not self._lock.closed and not self._joined and self.finished() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def share(self) -> None:
        """Let processes of this job join; no other run can work here while one of them lives."""
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def begin(self, inputs: dict[str, str]) -> None:
        """Say what the groups will be made of.

        Args:
            inputs: fingerprints by name.

        Raises:
            InvalidArgument: the groups that are here were made of something else.
            CheckpointError: what they were made of cannot be read.
        """
        path = self.folder / _INPUTS
        self._run = _digest(inputs)
        if not path.exists() or (self.finished() == 0 and not self._joined):
            document = {"version": _VERSION, "request": self._request, "inputs": inputs}
            replace_file(path, json.dumps(document, indent=1))
            return
        found = self.inputs()
        if found is None:
            raise CheckpointError(f"{path}: damaged; delete {self.folder} to begin anew")
        changed = [name for name in inputs if found.get(name) != inputs[name]]
        if changed:
            self.refuse(changed)

    def refuse(self, changed: list[str]) -> None:
        """Raise ``InvalidArgument``: the inputs named ``changed`` are others than those of the groups."""
        raise InvalidArgument(
            f"journal: {self.folder} holds groups of a run with another {' and another '.join(changed)}; "
            "give the same model, data and settings to go on with it, or delete it to begin anew"
        )

    @property
    def scratch(self) -> Path:
        """A folder for files that end with the process."""
        return self.folder / _SCRATCH

    def inputs(self) -> dict[str, str] | None:
        """What :meth:`begin` was given in an earlier run; None if it was never reached, or is damaged."""
        found = self._document().get("inputs")
        return found if isinstance(found, dict) else None

    def request(self) -> str | None:
        """The ``request`` of an earlier run."""
        return self._document().get("request")

    def _document(self) -> dict[str, Any]:
        try:
            found = read_json(self.folder / _INPUTS)
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def finished(self) -> int:
        """How many groups are kept."""
        return len(list(self.folder.glob("group-*.json")))

    def has(self, index: int) -> bool:
        """Whether a group seems to be kept."""
        return self._path(index, "json").exists()

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

        Raises:
            OSError: within ``memory.bounded``, the disk has no room for it.
        """
        if not self.has(index):
            return None
        try:
            mapped, document = self._read(index, names)
        except _DAMAGE as error:
            return self._damaged(index, error)
        # Copies: a file maps tensors at any address, which the last bits of a product depend on.
        tensors = {name: memory.copy(tensor) for name, tensor in mapped.items()}
        try:
            return FinishedGroup.decode(tensors, document)
        except _DAMAGE as error:
            return self._damaged(index, error)

    def _damaged(self, index: int, error: Exception) -> None:
        _log.warning("%s: damaged (%s); computed again", self._path(index, "json"), error)

    def discard(self) -> None:
        """Delete the folder: the model is saved. Of a joined process, only what is of this run."""
        if self._joined and _digest(self.inputs() or {}) != self._run:
            self._lock.close()
            return
        for path in self.folder.glob("group-*"):
            path.unlink(missing_ok=True)
        # Killed before this, a run knows that it is done; after it, nothing is left that speaks of one.
        # Whoever takes the lock next takes that of a new folder.
        aside = self.folder.with_name(f".{self.folder.name}.old-{secrets.token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):
            self.folder.rename(aside)
        self._lock.close()
        shutil.rmtree(aside, ignore_errors=True)

    def _write(self, index: int, group: FinishedGroup) -> None:
        tensors, document = group.encode()
        document["run"] = self._run
        with replaced_file(self._path(index, "safetensors"), self.scratch) as new:
            save_file(tensors, new)
            document["sha256"] = _sha256(new)
        replace_file(self._path(index, "json"), json.dumps(document))

    def _read(self, index: int, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        document = read_json(self._path(index, "json"))
        weights = self._path(index, "safetensors")
        if document["names"] != names or document["run"] != self._run:
            raise ValueError(f"it is of {document['names']} in another run")
        if _sha256(weights) != document["sha256"]:
            raise ValueError("its checksum differs")
        return map_tensors(weights), document

    def _path(self, index: int, kind: str) -> Path:
        return self.folder / f"group-{index:04d}.{kind}"


def _is_ours(name: str) -> bool:
    name = name.removeprefix(".").partition(".new-")[0]  # what a killed process was writing
    return name in (_LOCK, _INPUTS, _SCRATCH) or (
        name.startswith("group-") and name.endswith((".json", ".safetensors"))
    )


def _locked(folder: Path, kind: int) -> IO[bytes]:
    """The open lock file of ``folder``, locked."""
    path = folder / _LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = path.open("ab")
        except FileNotFoundError:  # renamed since
            continue
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise InvalidArgument(
                f"journal: another process works in {folder}; wait for it, or give another folder"
            ) from error
        # A run that has just finished may have moved the file away between the two calls.
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                return lock
        lock.close()


def _digest(inputs: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()
