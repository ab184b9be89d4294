"""How fast a step could be at most: its arithmetic and its bytes at measured rates."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

SIDE = 8192
"""Of the matrices whose product is timed."""

COPIED = 2**31
"""Bytes of the copy that is timed."""


def milliseconds(run: Callable[[], object], count: int = 1) -> float:
    """Of the device, by its own events, for one of `count` runs."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count


@dataclass(frozen=True)
class Rates:
    """What the device reaches.

    Attributes:
        matrix: operations a second in products of large matrices of random numbers, by precision.
        copy: bytes a second, those read and those written, in a large copy.
    """

    matrix: dict[str, float]
    copy: float


def measure() -> Rates:
    """Medians of ten runs after three to warm up."""

    def median(run: Callable[[], object]) -> float:
        milliseconds(run, 3)
        return statistics.median(milliseconds(run) for _ in range(10))

    rates = {}
    before = torch.get_float32_matmul_precision()
    for name, dtype, precision in (
        ("float32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
        ("bfloat16", torch.bfloat16, before),
    ):
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(SIDE, SIDE, device="cuda").to(dtype) for _ in range(2))
        rates[name] = 2 * SIDE**3 / (median(lambda a=a, b=b: a @ b) / 1000)
    torch.set_float32_matmul_precision(before)
    source = torch.randint(255, (COPIED,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return Rates(rates, 2 * COPIED / (median(lambda: target.copy_(source)) / 1000))


@dataclass(frozen=True)
class Work:
    """What a step must do.

    Attributes:
        operations: floating-point operations of its products, forward and backward.
        bytes: the fewest that it moves: all parameters read, the trained ones written too, what the
            backward pass keeps written and read once.
    """

    operations: float
    bytes: float


def work(loss: Callable[[], Tensor], network: nn.Module) -> Work:
    """Of a forward and a backward pass of a loss () of a network."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    own = {parameter.data_ptr() for parameter in network.parameters()}
    with FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        value.backward()
    for parameter in network.parameters():
        parameter.grad = None
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    trained = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    activations = sum(count for place, count in kept.items() if place not in own)
    return Work(counter.get_total_flops(), size + trained + 2 * activations)
