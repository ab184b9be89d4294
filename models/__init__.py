"""What a user swaps: Pyro programs, one a file, and backbones."""

from models.joint import joint
from models.normalised import normalised

__all__ = ["joint", "normalised"]
