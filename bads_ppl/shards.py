"""Networks of which each process holds a part of every parameter (torch's FSDP, `fully_shard`).

Parameters are put together layer by layer while they are used, and gradients come out averaged and
in parts. A kernel moves the parts; this module says what belongs to which part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bads_ppl.errors import InputError
from bads_ppl.ranks import Ranks


@dataclass(frozen=True)
class Shards:
    """How a network's trained parameters are cut along their first dimension.

    Attributes:
        ranks: the processes that have a part each.
        shapes: of the whole parameters.
    """

    ranks: Ranks
    shapes: Sequence[torch.Size]

    def part(self, number: int, whole: Tensor) -> Tensor:
        """This process's rows of a tensor that is shaped like a parameter, given by its number."""
        step = self._step(number)
        return whole[self.ranks.rank * step : (self.ranks.rank + 1) * step]

    def whole(self, number: int, part: Tensor) -> Tensor:
        """The tensor of which this process has a part; all processes must ask."""
        shape, step = self.shapes[number], self._step(number)
        padded = part.new_zeros((step, *shape[1:]))
        padded[: len(part)] = part
        every = self.ranks.gather(padded[None])
        return every.flatten(0, 1)[: shape[0]]

    def total(self, value: Tensor) -> Tensor:
        """The sum over the processes of a number () about each one's part."""
        return self.ranks.mean(value) * self.ranks.size

    def _step(self, number: int) -> int:
        return -(-self.shapes[number][0] // self.ranks.size)


def sharded(network: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """The network with its parameters shared out, in place: its repeated layers one by one.

    Args:
        network: on the device; a method `read` of its is made to work like `forward`.
        ranks: all processes of torch's default group.
        device: of the network.

    Raises:
        InputError: if it has parameters without dimensions, or writes texts.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    check_shardable(network)
    mesh = init_device_mesh(device.type, (ranks.size,))
    for layer in _layers(network):
        fully_shard(layer, mesh=mesh)
    # What is used between steps must be put together again: values have moved.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    if hasattr(network, "read"):
        register_fsdp_forward_method(network, "read")
    return network


def check_shardable(network: nn.Module) -> None:
    """Refuse a network whose parameters cannot be shared out.

    Raises:
        InputError: if it has parameters without dimensions, or writes texts.
    """
    for name, parameter in network.named_parameters():
        if parameter.ndim == 0:
            raise InputError(
                f"parameter {name!r} is one number, which cannot be shared out: take parallel=data"
            )
    if hasattr(network, "generate"):
        raise InputError(
            f"a {type(network).__name__} writes texts and cannot be shared out: take parallel=data"
        )


def is_sharded(network: nn.Module) -> bool:
    """Whether `sharded` was called on it."""
    return hasattr(network, "set_reshard_after_forward")


def shards_of(network: nn.Module, parameters: Sequence[Tensor]) -> Shards | None:
    """How these parameters of a network are shared out; None if they are not."""
    if not is_sharded(network):
        return None
    mesh: Any = parameters[0].device_mesh  # type: ignore[attr-defined]
    return Shards(Ranks(mesh.get_local_rank(), mesh.size()), [p.shape for p in parameters])


def own(tensor: Tensor) -> Tensor:
    """This process's part, in the same memory, of a tensor that is shared out; or the tensor."""
    found: Tensor = getattr(tensor.detach(), "_local_tensor", tensor)
    return found


def together(tensor: Tensor) -> Tensor:
    """A tensor as a whole, where it is shared out; all processes must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def put(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into one that may be shared out."""
    mine = own(target)
    if mine is not target:
        mesh: Any = target.device_mesh  # type: ignore[attr-defined]
        ranks = Ranks(mesh.get_local_rank(), mesh.size())
        whole = Shards(ranks, [target.shape]).part(0, whole)
    mine.copy_(whole)


def _layers(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost lists of layers, layer by layer."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)
