"""The errors that bads-ppl raises for its users."""


class InputError(ValueError):
    """Wrong input from the user; the message names the value, the expectation and the remedy."""


class Unstable(InputError):
    """Step sizes that would make a chain run away from its start; the message says which to try."""


class Diverged(RuntimeError):
    """A chain reached a non-finite potential; the message says which step sizes to try."""


class RanksError(RuntimeError):
    """The processes of one run came apart: one of them ended, or their states differ."""
