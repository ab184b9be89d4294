"""What the benchmarks' command lines share."""

from __future__ import annotations

import argparse


def positive_integer(text: str) -> int:
    """A whole number of at least 1.

    Raises:
        ValueError: if it is no whole number, which argparse reports by the name of this function.
        argparse.ArgumentTypeError: if it is less than 1.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
