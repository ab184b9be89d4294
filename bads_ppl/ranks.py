"""Several processes that run one chain together: who they are, and how they agree.

Each process (rank) holds the whole state of the chain and a generator in the same state, draws the
same rows of a step, and runs the program on its share of them. Gradients and statistics are then
averaged over the processes, so that all make the same move. One process alone, `ALONE`, has the
same form and costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bads_ppl.errors import InputError, RanksError

BUCKET = 2**26
"""Most elements that are sent at a time, where there are several tensors."""

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them.

    Every method must be called by all of them, in the same order.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
        control: a group that talks from host to host, without a look at the device.
    """

    rank: int = 0
    size: int = 1
    control: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def joined(cls) -> Ranks:
        """All processes of torch's default group, which stands."""
        control = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        return cls(dist.get_rank(), dist.get_world_size(), control)

    def leave(self) -> None:
        """At a run's end: the group's threads end before the interpreter does.

        One that still runs while the interpreter goes can abort the process.
        """
        if not self.alone:
            dist.destroy_process_group()

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This process's share (B / size, ...) of rows (B, ...): every size-th."""
        return rows if self.alone else rows[self.rank :: self.size]

    def gather(self, part: Tensor) -> Tensor:
        """All rows (B, ...) in their order, from the shares (B / size, ...) of all processes."""
        if self.alone:
            return part
        part = part.detach().contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)]
        with _told():
            dist.all_gather(parts, part)
        return torch.stack(parts, 1).flatten(0, 1)

    @torch.no_grad()
    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its mean over the processes, in place."""
        if self.alone:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with _told():
                dist.all_reduce(flat)
            parts = flat.div_(self.size).split([tensor.numel() for tensor in bucket])
            shaped = [part.view_as(one) for part, one in zip(parts, bucket, strict=True)]
            torch._foreach_copy_(list(bucket), shaped)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes, without a graph; the tensor stays."""
        if self.alone:
            return value.detach()
        result = value.detach().clone()
        self.mean_([result])
        return result

    def whole(self, value: Tensor) -> Tensor:
        """The mean over the processes, with the derivative of this process's own value.

        The mean over the processes of gradients through it is the gradient of the mean.
        """
        return value if self.alone else value + (self.mean(value) - value.detach())

    def most(self, *values: int) -> list[int]:
        """Of each number its largest over the processes; hosts wait for hosts, not for devices."""
        if self.alone:
            return list(values)
        told = torch.tensor(values, dtype=torch.int64)
        with _told():
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self.control)
        return told.tolist()

    def wait(self) -> None:
        """Until all are here."""
        self.most(0)

    def in_turn(self, work: Callable[[], T]) -> T:
        """Do the same work in all processes: in the first, which may leave files, then the others.

        The work itself must not call any method of this class.
        """
        if not self.first:
            self.wait()
        result = work()
        if self.first:
            self.wait()
        self.wait()
        return result

    def check_share(self, batch: int, size: int, name: str) -> None:
        """Refuse a batch of a set of `size` points that cannot be shared out evenly.

        Raises:
            InputError: with sizes that can.
        """
        if batch % self.size:
            below = batch - batch % self.size
            fit = [str(one) for one in (below, below + self.size) if 0 < one <= size]
            remedy = f"take {' or '.join(fit)}" if fit else f"the {name} set has {size} only"
            raise InputError(
                f"{name}_batch must be a multiple of the number of processes, {self.size}, got "
                f"{batch}: {remedy}, or let each process run chains of its own (parallel=chains)"
            )

    @torch.no_grad()
    def apart(self, tensors: dict[str, Tensor]) -> list[str]:
        """Names of those tensors that are not equal, bit for bit as far as sums of bits tell."""
        if self.alone or not tensors:
            return []
        sums = [int(_bits(tensor)) for tensor in tensors.values()]
        most, least = self.most(*sums), self.most(*(-one for one in sums))
        extremes = zip(tensors, most, least, strict=True)
        return [name for name, high, low in extremes if high != -low]


ALONE = Ranks()
"""One process: nobody to share with or to wait for."""


def processes() -> int:
    """How many processes a launcher such as torchrun has started, by the environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _bits(tensor: Tensor) -> Tensor:
    """Sum () of a tensor's bits, taken as whole numbers, on the tensor's device."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(kinds[flat.element_size()]).sum(dtype=torch.int64)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one kind and device together, `BUCKET` elements at a time where there are more."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        bucket: list[Tensor] = []
        for tensor in alike:
            if bucket and sum(one.numel() for one in bucket) + tensor.numel() > BUCKET:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket


@contextmanager
def _told() -> Iterator[None]:
    """Says what it means when the others are gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise RanksError(
            "another process of this run ended or cannot be reached; its own message says why. "
            f"resume=true continues from the last checkpoint ({reason})"
        ) from error
