"""Work with more than memory holds: large tensors in files, of which only what is in use is resident.

Within :func:`bounded` the weights of a model are mapped from its files, whatever grows with the number of
layers is kept in scratch files (:func:`keep`, :func:`empty`), and :func:`relax` lets go of all pages that
are mapped: they come back from the page cache, or the disk, when they are touched. So no algorithm has to
know how large the model is; it only says, layer by layer, that it has finished with something.

Outside of it, :func:`keep` returns its argument and :func:`relax` does nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import tempfile
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .errors import InvalidArgument, MemoryLimit

CHUNK = 2**25
"""Elements that an algorithm works on at once, where it can choose."""

_SMALL = 2**16  # bytes below which a tensor stays where it is
_SEGMENT = 2**26  # bytes of a scratch file that several tensors share
_LARGE_MODULE = 2**23  # bytes of weights before whose use all others are let go
_OPEN_FILES = 65536
_OWN_PAGES = 2**20  # bytes from which a tensor in memory has pages of its own
_M_MMAP_THRESHOLD = -3  # of malloc.h
_ALIGNMENT = 64  # kernels like it, and the last bits of a product depend on it

_current: ContextVar[_Workspace | None] = ContextVar("fips_ext.memory", default=None)


@contextlib.contextmanager
def bounded(folder: str | Path, limit: int | None = None) -> Iterator[None]:
    """Within it large tensors lie in files.

    Args:
        folder: on a disk with room for them. They have no names there, and end with the process.
        limit: bytes that the process may have resident. It is looked at by :func:`relax`.

    For the rest of the process, glibc returns what large tensors had when they go, and as many files may be
    open as the system allows.

    Raises:
        InvalidArgument: a limit, where the system does not say what is resident.
        MemoryLimit: from :func:`relax`, if there was more.
        OSError: from :func:`keep` and :func:`empty`, if the disk is full.
    """
    workspace = _Workspace(Path(folder), limit)
    token = _current.set(workspace)
    hook = register_module_forward_pre_hook(_before_module)
    try:
        yield
    finally:
        hook.remove()
        _current.reset(token)


def is_bounded() -> bool:
    """Whether this is within :func:`bounded`."""
    return _current.get() is not None


def keep(tensor: Tensor) -> Tensor:
    """The same content, in a scratch file if there are such and it is not small."""
    workspace = _current.get()
    if workspace is None or not _is_large(tensor) or workspace.holds(tensor):
        return tensor
    kept = workspace.empty(tensor.shape, tensor.dtype)
    kept.copy_(tensor.detach())
    return kept


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Uninitialised, in a scratch file if there are such."""
    workspace = _current.get()
    if workspace is None or torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return workspace.empty(shape, dtype)


def copy(tensor: Tensor) -> Tensor:
    """A copy on the host, in a scratch file if there are such."""
    copied = empty(tuple(tensor.shape), tensor.dtype)
    copied.copy_(tensor.detach())
    relax()
    return copied


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Like :func:`empty`, of zeros."""
    filled = empty(shape, dtype, device).zero_()
    relax()
    return filled


def keep_module(module: nn.Module) -> None:
    """:func:`keep` every parameter and buffer of ``module``, in place."""
    if not is_bounded():
        return
    for parameter in module.parameters():
        parameter.data = keep(parameter.data)
    for part in module.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else keep(buffer)


def relax() -> None:
    """Let go of every page that is mapped.

    Raises:
        MemoryLimit: more was resident than :func:`bounded` allows.
    """
    workspace = _current.get()
    if workspace is not None:
        workspace.release()


@contextlib.contextmanager
def kept_graph() -> Iterator[None]:
    """Within it, what autograd saves for the backward pass is kept."""
    if not is_bounded():
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda t: keep(t.detach()), lambda t: t):
        yield


def column_chunks(matrix: Tensor) -> list[slice]:
    """Slices of the columns of ``[rows, n]``, each of at most :data:`CHUNK` elements if rows are fewer."""
    rows, columns = matrix.shape
    size = max(1, CHUNK // max(1, rows))
    return [slice(start, start + size) for start in range(0, columns, size)] or [slice(0, 0)]


def map_file(path: str | Path) -> mmap.mmap:
    """A file as a buffer, for ``torch.frombuffer``; what is written to it is lost.

    Raises:
        OSError, ValueError: it cannot be read, or it is empty.
    """
    with Path(path).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if (workspace := _current.get()) is not None:
        workspace.add(mapped)
    return mapped


def scratch(count: int, dtype: torch.dtype, folder: str | Path | None = None) -> Tensor:
    """``[count]`` uninitialised in a file without a name, whatever the mode.

    Raises:
        OSError: the disk is full.
    """
    return torch.frombuffer(_scratch_map(count * dtype.itemsize, folder), dtype=dtype, count=count)


def peak(process: int | str = "self") -> int:
    """The most bytes of a process that were resident; since :func:`bounded`, within it."""
    return _status("VmHWM", process)


def resident() -> int:
    """Bytes of this process that are resident now."""
    return _status("VmRSS", "self")


class _Workspace:
    """Scratch files, and everything that is mapped.

    A mapping ends with the last tensor over it, which holds it; here are only weak references.
    """

    def __init__(self, folder: Path, limit: int | None) -> None:
        self._folder, self._limit = folder, limit
        self._maps: weakref.WeakKeyDictionary[mmap.mmap, range] = weakref.WeakKeyDictionary()
        self._segment: weakref.ref[mmap.mmap] | None = None
        self._used = 0
        with contextlib.suppress(OSError), Path("/proc/self/clear_refs").open("w") as file:
            file.write("5")  # begin a new high-water mark
        if limit is not None and not peak():
            raise InvalidArgument("max_memory: this system does not say what is resident; leave it out")
        _return_what_is_freed()
        # A mapping holds its file open.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

    def add(self, mapped: mmap.mmap) -> None:
        start = torch.frombuffer(mapped, dtype=torch.uint8, count=1).data_ptr()
        self._maps[mapped] = range(start, start + len(mapped))

    def holds(self, tensor: Tensor) -> bool:
        start = tensor.untyped_storage().data_ptr()
        return any(start in addresses for addresses in self._maps.values())

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        if size < _SMALL:
            return torch.empty(shape, dtype=dtype)
        segment = None if self._segment is None else self._segment()
        if segment is None or self._used + size > len(segment):
            segment, self._used = _scratch_map(max(size, _SEGMENT), self._folder), 0
            self.add(segment)
            self._segment = weakref.ref(segment)
        tensor = torch.frombuffer(segment, dtype=dtype, count=count, offset=self._used)
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return tensor.view(shape)

    def release(self) -> None:
        most = peak()
        for mapped in list(self._maps):
            mapped.madvise(mmap.MADV_DONTNEED)
        if self._limit is not None and most > self._limit:
            raise MemoryLimit(
                f"max_memory: {_gib(most)} were needed at once, {_gib(self._limit)} are allowed; allow more, "
                "and the same command goes on; or begin anew with a smaller group_size or rank"
            )


def _return_what_is_freed() -> None:
    """Make glibc give each large tensor pages of its own, which go back when it does.

    By itself it learns to take tensors of up to 32 MiB from its heap, where one small object that outlives
    its neighbours keeps the room of all of them resident.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES)


def _scratch_map(size: int, folder: str | Path | None) -> mmap.mmap:
    with tempfile.TemporaryFile(dir=folder) as file:
        _allocate(file, max(size, 1))
        return mmap.mmap(file.fileno(), max(size, 1))


def _allocate(file: BinaryIO, size: int) -> None:
    """Give ``file`` its blocks now: to write to a hole of a mapped file on a full disk would be a crash."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


def _is_large(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.numel() * tensor.element_size() >= _SMALL


def _before_module(module: nn.Module, _args: Any) -> None:
    own = module._parameters.values()
    if sum(p.numel() * p.element_size() for p in own if p is not None) >= _LARGE_MODULE:
        relax()


def _status(field: str, process: int | str) -> int:
    """A field of ``/proc/PROCESS/status`` in bytes; 0 where there is no such file."""
    with contextlib.suppress(OSError), Path(f"/proc/{process}/status").open() as file:
        for line in file:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
