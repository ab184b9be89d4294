"""The errors that bads-ppl raises for its users."""

import signal


class InputError(ValueError):
    """Wrong input from the user; the message names the value, the expectation and the remedy."""


class Unstable(InputError):
    """Step sizes that would make a chain run away from its start; the message says which to try."""


class Diverged(RuntimeError):
    """A chain reached a non-finite potential; the message says which step sizes to try."""


class RanksError(RuntimeError):
    """The processes of one run came apart: one of them ended, or their states differ."""


class Stopped(Exception):
    """A signal ended the run after a checkpoint. `signum` is the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} with a checkpoint: run again with "
            "resume=true to continue"
        )
        self.signum = signum
