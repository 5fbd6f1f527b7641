"""Several processes at one compression, by ``torchrun``: who does what, and how results are joined.

Batches of calibration data are dealt out in turns, and groups: each is worked on by one process, or, where
there are more processes than groups, by a team that shares out the tokens of every step. Sums of parts differ
from the sum of one process by rounding alone: what is drawn at random does not depend on how many there are.

Outside of :func:`processes` there is one process, whatever else a program does with ``torch.distributed``,
and every function here does nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import InvalidArgument

# torchrun notices a process that dies; one that works longer than others is no reason to give up.
_PATIENCE = datetime.timedelta(days=30)

_joined = False


def _is_active() -> bool:
    return _joined


def rank() -> int:
    return dist.get_rank() if _is_active() else 0


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if _is_active() else 1


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Within it the processes that ``torchrun`` started work together; without ``torchrun`` there is one.

    All of them must then call :func:`fips_ext.calibrate` and :func:`fips_ext.compress` alike.
    """
    global _joined
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _joined:
        yield
        return
    owned = not dist.is_initialized()
    if owned:
        cuda = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    _joined = True
    try:
        yield
    finally:
        _joined = False
        if owned:
            dist.destroy_process_group()


def own_device(device: str) -> str:
    """``cuda`` as the GPU of this process; any other as it is."""
    if device != "cuda" or size() == 1:
        return device
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return f"cuda:{torch.cuda.current_device()}"


def barrier() -> None:
    if _is_active():
        dist.barrier()


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes."""
    if _is_active():
        for tensor in tensors:
            dist.all_reduce(tensor)


def join_parts(tensor: Tensor, group: Any = None) -> None:
    """Replace a contiguous tensor, each element of which only one process has and the others hold as zero."""
    if _is_active() and tensor.numel():
        raw = tensor.view(-1).view(torch.uint8)
        # Sums of bits with zeros: exact, for any dtype.
        whole = raw.numel() // 4 * 4
        if whole and raw.data_ptr() % 4 == 0:
            dist.all_reduce(raw[:whole].view(torch.int32), group=group)
            raw = raw[whole:]
        if raw.numel():
            dist.all_reduce(raw, group=group)


def gather(value: Any) -> list[Any]:
    """The values of all processes, in order."""
    if not _is_active():
        return [value]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


def check_equal(values: dict[str, str], what: str) -> None:
    """Raise ``InvalidArgument`` unless all processes have the same."""
    for other, found in enumerate(gather(values)):
        differing = [name for name in values if found.get(name) != values[name]]
        if differing:
            raise InvalidArgument(
                f"{what}: processes {rank()} and {other} have another {' and another '.join(differing)}; "
                "give every node the same files and options"
            )


class Teams:
    """Which processes work on which group.

    Args:
        groups: how many there are.
    """

    def __init__(self, groups: int) -> None:
        everyone, count = range(size()), max(1, groups)
        self._members = [
            [r for r in everyone if r % count == g] if len(everyone) > count else [g % len(everyone)]
            for g in range(groups)
        ]
        # Every process has to call new_group for every team.
        self._handles = [dist.new_group(m, timeout=_PATIENCE) if len(m) > 1 else None for m in self._members]

    def mine(self) -> list[int]:
        """The groups that this process works on."""
        return [g for g, members in enumerate(self._members) if rank() in members]

    def leader(self, group: int) -> int:
        """The process whose results count."""
        return self._members[group][0]

    def of(self, group: int) -> Team:
        return Team(self._members[group], self._handles[group])


class Team:
    """The processes that work on one group.

    Attributes:
        place: of this process among them.
        size: how many they are.
    """

    def __init__(self, members: list[int], handle: Any) -> None:
        self.size = len(members)
        self.place = members.index(rank()) if rank() in members else 0
        self._leader, self._handle = members[0], handle

    @property
    def leads(self) -> bool:
        """Whether this process speaks for the team."""
        return self.place == 0

    def agree(self, leader_says: bool) -> bool:
        """What the leader says; the others' word does not count."""
        return self.broadcast(bytes([leader_says]) if self.leads else None) == b"\x01"

    def any(self, here: bool) -> bool:
        """Whether it is so for one of the team."""
        count = torch.tensor([int(here)])
        self.add_up([count])
        return bool(count)

    def broadcast(self, data: bytes | None) -> bytes:
        """What the leader has; the others give None."""
        if self.size == 1:
            return data
        length = torch.tensor([len(data) if self.leads else 0])
        self.broadcast_into(length)
        content = bytearray(data) if self.leads else bytearray(int(length))
        if content:
            self.broadcast_into(torch.frombuffer(content, dtype=torch.uint8))
        return bytes(content)

    def broadcast_into(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor on the host by that of the leader, of the same dtype and shape."""
        if self.size > 1 and tensor.numel():
            raw = tensor.detach().view(-1).view(torch.uint8)
            dist.broadcast(raw, self._leader, group=self._handle)

    def takes(self, number: int) -> bool:
        """Whether the ``number``-th of many parts is this process's to work on."""
        return number % self.size == self.place

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the team."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self._handle)

    def join_parts(self, tensor: Tensor) -> None:
        """See :func:`join_parts`."""
        if self.size > 1:
            join_parts(tensor, self._handle)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their sum over the team."""
        if self.size > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self.add_up([parameter.grad])


ALONE = Team([0], None)


def everyone(leader: int = 0) -> Team:
    """All processes."""
    return Team([leader, *(r for r in range(size()) if r != leader)], None)
