"""What a user swaps: Pyro programs, one a file, and backbones."""

from models.bilevel import bilevel
from models.joint import joint
from models.learned_sparsity import learned_sparsity
from models.normalised import normalised
from models.selective import selective

__all__ = ["bilevel", "joint", "learned_sparsity", "normalised", "selective"]
