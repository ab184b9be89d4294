"""Bayesian data point selection: which training points to trust, and how sure that is.

`select` is the short way. The long way: a program (`bads_ppl.program`, `models/`), a kernel
(`SGLD`), chains (`run_chains`), and a `Selection` from their draws.
"""

from bads_ppl.chains import run_chains
from bads_ppl.cyclical import CyclicalSGLD
from bads_ppl.data import Batch, Data
from bads_ppl.errors import Diverged, InputError, Stopped
from bads_ppl.losses import cross_entropy
from bads_ppl.plan import Plan
from bads_ppl.preconditioned import PreconditionedSGLD
from bads_ppl.primitives import plate_sum, running_mean, sample_network
from bads_ppl.priors import NormalPrior, SparsityPrior
from bads_ppl.program import Impact, Model, Parts, bind
from bads_ppl.select import select
from bads_ppl.selection import Selection
from bads_ppl.sghmc import SGHMC
from bads_ppl.sgld import SGLD
from bads_ppl.snapshots import Snapshots
from bads_ppl.weights import FixedWeights, InstanceWeights, WeightNetwork

__all__ = [
    "SGHMC",
    "SGLD",
    "Batch",
    "CyclicalSGLD",
    "Data",
    "Diverged",
    "FixedWeights",
    "Impact",
    "InputError",
    "InstanceWeights",
    "Model",
    "NormalPrior",
    "Parts",
    "Plan",
    "PreconditionedSGLD",
    "Selection",
    "Snapshots",
    "SparsityPrior",
    "Stopped",
    "WeightNetwork",
    "bind",
    "cross_entropy",
    "plate_sum",
    "run_chains",
    "running_mean",
    "sample_network",
    "select",
]
