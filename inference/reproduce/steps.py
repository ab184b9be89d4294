"""Steps on demand, with their time and memory: what a process that takes steps is made of.

It reads numbers of steps from standard input, a line each, takes them, and answers with a line of
JSON. It imports little, so that a process that has nothing else to load starts soon.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from bads_ppl.data import Data

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

Step = Callable[[], None]


class Memory:
    """Peak of the memory in MiB above what was in use at the start, the data included.

    None where nobody can tell: on a CPU it is Linux that does, for the process.

    Args:
        device: where steps are taken.
        data: sets that will be moved there.
    """

    def __init__(self, device: torch.device, data: Sequence[Data]) -> None:
        self.device = device
        self.start = 0.0
        gc.collect()
        self.reset()
        self.start = self.peak() or 0.0
        if device.type != "cpu":
            tensors = [leaf for one in data for leaf in (*tree_leaves(one.input), one.target)]
            self.start += sum(leaf.numel() * leaf.element_size() for leaf in tensors) / 2**20

    def reset(self) -> None:
        """Forget the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with suppress(OSError, AttributeError):  # where there is no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            CLEAR.write_text("5")

    def peak(self) -> float | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20 - self.start
        if self.device.type != "cpu" or not CLEAR.exists():
            return None
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
        return int(found[1]) / 2**10 - self.start if found else None


def timed(step: Step, count: int, memory: Memory, device: torch.device) -> dict[str, float | None]:
    """Take steps; seconds by the clock and of this process's processor time, and peak memory."""
    memory.reset()
    finish(device)
    start, processor = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    finish(device)
    return {
        "seconds": time.perf_counter() - start,
        "processor_s": time.process_time() - processor,
        "peak_mib": memory.peak(),
    }


def take_steps(step: Step, memory: Memory, device: torch.device) -> None:
    """Take as many steps as each line of standard input says, and answer as `timed` does."""
    for line in sys.stdin:
        print(json.dumps(timed(step, int(line), memory, device)), flush=True)


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
