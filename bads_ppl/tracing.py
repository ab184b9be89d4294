"""The two Pyro handlers that run a program for a stochastic-gradient kernel.

`Find` records a program's sites and sets up their values; `Evaluate` runs the program with those
values in place and collects its log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro.distributions import Unit, constraints
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import SigmoidTransform, biject_to

from bads_ppl.data import Batch
from bads_ppl.errors import InputError
from bads_ppl.ranks import ALONE, Ranks
from bads_ppl.sites import (
    GlobalSite,
    Logit,
    NetworkSite,
    PlateSum,
    RunningMean,
    Table,
    evaluation_mode,
    new_table,
    total_dtype,
)

if TYPE_CHECKING:
    from bads_ppl.latents import Latents


Outputs = dict[str, list[Any]]
"""Outputs of each network, call by call."""


def _unconstrain(fn: Any) -> Any:
    """The bijection from real numbers to the support of a distribution, free of its batch shape.

    Bounds that are tensors, as those of Uniform, are taken as numbers where all agree, so that the
    bijection fits any number of rows.
    """
    support = fn.support
    if isinstance(support, constraints.interval):
        bounds = [torch.as_tensor(b) for b in (support.lower_bound, support.upper_bound)]
        low, high = (float(b.flatten()[0]) if (b == b.flatten()[0]).all() else b for b in bounds)
        support = constraints.interval(low, high)
    elif isinstance(support, constraints.greater_than):
        bound = torch.as_tensor(support.lower_bound)
        if (bound == bound.flatten()[0]).all():
            support = constraints.greater_than(float(bound.flatten()[0]))
    return biject_to(support)


class Term(NamedTuple):
    """One statement's part of the log joint: the sum of `scale * log_prob`."""

    name: str
    log_prob: Tensor  # (...), with its graph
    scale: float | Tensor  # a number, or one shaped like `log_prob`
    plates: frozenset[str] = frozenset()

    def total(self) -> Tensor:
        """The part ()."""
        return _total(self.log_prob, self.scale)


def _total(log_prob: Tensor, scale: float | Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        return (log_prob * scale).sum()
    return log_prob.sum() if scale == 1 else log_prob.sum() * scale


class Told(NamedTuple):
    """What an evaluation found, for the host to see."""

    terms: dict[str, Tensor]  # by statement, not scaled, detached
    scales: dict[str, float | Tensor]

    def potential(self) -> Tensor:
        """The potential () on the batch, of several processes on this one's share."""
        found = [_total(term, self.scales[name]) for name, term in self.terms.items()]
        return -torch.stack(found).sum() if found else torch.zeros(())


class _Root(torch.autograd.Function):
    """A scalar whose derivatives are given, and whose value is not worked out.

    `torch.autograd.backward` takes such derivatives too, but looks at each of them with machinery
    for symbolic shapes, which costs more than the operations that are spared, and 35 MiB.
    """

    @staticmethod
    def forward(ctx: Any, seeds: list[Tensor], *log_probs: Tensor) -> Tensor:
        ctx.seeds = seeds
        return log_probs[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.seeds)


class _PlateTotal(torch.autograd.Function):
    """A total that is known, with the derivative of `Batch.total` in the batch's values (B,)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, total: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        return total.to(value.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        batch = ctx.batch
        slope = grad * (batch.size / len(batch))
        if batch.importance is not None:
            return slope * batch.importance, None, None
        return slope.expand(len(batch)), None, None


class Seeds:
    """Derivatives of the potential in the terms' log-probabilities, which no step makes again."""

    MOST = 64

    def __init__(self) -> None:
        self._kept: dict[Any, Tensor] = {}

    def backward(self, terms: Iterable[Term], retain_graph: bool = False) -> None:
        """Add the gradient of minus these terms' sum to that of every leaf, without the sum."""
        found = [term for term in terms if term.log_prob.requires_grad]
        minus: dict[int, Tensor] = {}  # plates share their scales
        seeds = []
        for term in found:
            scale = term.scale
            if not isinstance(scale, Tensor):
                seeds.append(self._constant(term.log_prob, scale))
                continue
            if id(scale) not in minus:
                minus[id(scale)] = -scale
            seeds.append(minus[id(scale)])
        if found:
            root = _Root.apply(seeds, *(term.log_prob for term in found))
            root.backward(retain_graph=retain_graph)

    def _constant(self, like: Tensor, scale: float) -> Tensor:
        key = (like.shape, scale, like.dtype, like.device)
        seed = self._kept.get(key)
        if seed is None:
            seed = torch.full_like(like, -scale).detach()
            if len(self._kept) < self.MOST:  # else scales do not come back; graphs may use these
                self._kept[key] = seed
        return seed


class Reached(Exception):
    """The site that a run of a program is about has its value; the rest need not be run."""


class Find(Messenger):
    """Records the sites of a program and gives them their initial values."""

    def __init__(self, latents: Latents) -> None:
        super().__init__()
        self.latents = latents
        self.seen: dict[str, Any] = {}

    def _pyro_network(self, msg: Any) -> None:
        module, prior, name, companion = msg["args"]
        site = NetworkSite(name, module, prior, companion)
        self.latents.networks[name] = site

        def call(*args: Any, **kwargs: Any) -> Any:
            with evaluation_mode(module):  # finding sites is no step: statistics stay as they are
                return module(*args, **kwargs)

        msg["value"], msg["done"], msg["stop"] = call, True, True

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        name, fn = msg["name"], msg["fn"]
        if fn.support.is_discrete:
            raise InputError(
                f"site {name!r} is discrete ({type(fn).__name__}): gradient-based kernels need "
                "continuous latents; sum it out in the program"
            )

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        name, fn = msg["name"], msg["fn"]
        transform = _unconstrain(fn)
        initial = msg["infer"].get("initial")
        shape = fn.shape()
        like = msg["value"]
        if initial is None:
            unconstrained = torch.zeros(transform.inverse_shape(shape), device=like.device)
        else:
            start = torch.as_tensor(initial, dtype=like.dtype, device=like.device)
            if start.numel() != 1:
                raise InputError(
                    f"'initial' of site {name!r} must be one number, got shape "
                    f"{tuple(start.shape)}: all rows and elements start at the same value"
                )
            unconstrained = transform.inv(start.expand(shape)).contiguous()
        plates = [f for f in msg["cond_indep_stack"] if f.vectorized]
        if len(plates) > 1:
            raise InputError(
                f"local latent {name!r} is in {len(plates)} plates, "
                f"{[frame.name for frame in plates]}: a local latent may be in one; give it "
                "event dimensions with .to_event() in place of inner plates"
            )
        if plates:
            (frame,) = plates
            if type(transform) is SigmoidTransform and hasattr(fn, "log_density_of_logit"):
                transform = Logit()
            value = new_table(frame.full_size, unconstrained[0], self.latents.folder)
            self.latents.tables[name] = Table(frame.name, value, transform, value.new_zeros(()))
            msg["value"] = transform(value[: frame.size])
        else:
            value = unconstrained.clone().requires_grad_()
            self.latents.globals[name] = GlobalSite(value, transform)
            msg["value"] = transform(value.detach())
        self.seen[name] = msg["value"]

    def _pyro_plate_sum(self, msg: Any) -> None:
        value, batch = msg["args"]
        for name, table in self.latents.tables.items():
            if value is self.seen[name]:
                self.latents.sums[msg["name"]] = PlateSum(table.total(), name)
                return
        mean = value.detach().mean()
        memory = mean.expand(batch.size).clone()
        total = memory.sum(dtype=total_dtype(value.device))
        self.latents.sums[msg["name"]] = PlateSum(total, None, memory)

    def _pyro_steps_taken(self, msg: Any) -> None:
        self.latents.changes = True

    def _pyro_running_mean(self, msg: Any) -> None:
        value, window, kind = msg["args"]
        size = window if kind == "simple" else 1
        values = torch.zeros(size, dtype=value.dtype, device=value.device)
        self.latents.means[msg["name"]] = RunningMean(kind, window, values)


class Evaluate(Messenger):
    """Runs a program with the latents' values in place and collects its log-probabilities.

    Args:
        latents: the values.
        keep: site that the program is run for.
        hold: keep the networks' outputs, in `held`.
        replay: outputs to take in place of calls of the networks.
        release: takes the gradients of terms whose graph the program lets go of, given the names of
            those before; None: it is kept.
        ranks: processes that have the batch's other rows.
    """

    def __init__(
        self,
        latents: Latents,
        *,
        keep: str | None = None,
        hold: bool = False,
        replay: Outputs | None = None,
        release: Callable[[list[Term], list[str]], None] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.latents = latents
        self.ranks = ranks
        self.keep = keep
        self.hold = hold
        self.release = release
        self.released: list[str] = []
        self.held: Outputs = {}
        self.replay = {name: iter(outputs) for name, outputs in (replay or {}).items()}
        self.kept: Tensor | None = None
        self.index: dict[str, Tensor] = {}
        self.terms: list[Term] = []

    def _pyro_network(self, msg: Any) -> None:
        name = msg["args"][2]
        network = self.latents.networks[name].call
        if name in self.replay:
            msg["value"] = lambda *args, **kwargs: next(self.replay[name])
        elif self.hold:
            msg["value"] = partial(self._call_and_hold, name, network)
        else:
            msg["value"] = network
        msg["done"] = msg["stop"] = True

    def _call_and_hold(self, name: str, network: Any, *args: Any, **kwargs: Any) -> Any:
        output = network(*args, **kwargs)
        self.held.setdefault(name, []).append(output)
        return output

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            return
        name = msg["name"]
        if site_is_subsample(msg):
            self.index[name] = msg["value"]
            return
        table = self.latents.tables.get(name)
        if table is not None:
            table.index = self.index[table.plate]
            rows = table.value.index_select(0, table.index)
            rows.requires_grad_(torch.is_grad_enabled())
            table.rows, table.constrained = rows, table.transform(rows)
            msg["value"] = table.constrained
        else:
            site = self.latents.globals[name]
            msg["value"] = site.transform(site.value)
        msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name == self.keep:
            self.kept = msg["value"].detach()
            raise Reached
        if site_is_subsample(msg) or "_deterministic" in msg["infer"]:
            return
        fn = msg["fn"]
        if not msg["is_observed"]:
            log_prob = self._log_density(name, fn, msg["value"])
        else:
            log_prob = fn.log_factor if type(fn) is Unit else fn.log_prob(msg["value"])
        plates = frozenset(frame.name for frame in msg["cond_indep_stack"])
        scale = msg["scale"]
        if msg["mask"] is not None:
            log_prob = scale_and_mask(log_prob, 1.0, msg["mask"])
        if isinstance(scale, Tensor) and scale.shape != log_prob.shape:
            log_prob, scale = log_prob * scale, 1.0
        self.terms.append(Term(name, log_prob, scale, plates))

    def told(self) -> Told:
        terms = {term.name: term.log_prob.detach() for term in self.terms}
        return Told(terms, {term.name: term.scale for term in self.terms})

    def _log_density(self, name: str, fn: Any, value: Tensor) -> Tensor:
        """Log p(x) + T log|dx/du| (T: the group's): p(x)^(1/T) is the target on the scale of x.

        A distribution on (0, 1) may know this sum as a function of the logit, its sigmoid and T.
        """
        temperature = self.latents.temperature.get(name, 1.0)
        table = self.latents.tables.get(name)
        site = table if table is not None else self.latents.globals[name]
        unconstrained = table.rows if table is not None else site.value
        fused = getattr(fn, "log_density_of_logit", None)
        if fused is not None and isinstance(site.transform, SigmoidTransform):
            density: Tensor = fused(unconstrained, value, temperature)
            return density
        log_prob: Tensor = fn.log_prob(value)
        if temperature == 0:
            return log_prob
        jacobian: Tensor = site.transform.log_abs_det_jacobian(unconstrained, value)
        return log_prob + temperature * jacobian

    def _pyro_plate_sum(self, msg: Any) -> None:
        value, batch = msg["args"]
        state = self.latents.sums[msg["name"]]
        if state.table is not None:
            msg["value"] = _PlateTotal.apply(value, state.total, batch)
        else:
            assert state.memory is not None
            remembered = state.memory[batch.index]
            state.pending = (batch.whole.index, batch.ranks.gather(value.detach()))
            msg["value"] = state.total.to(value.dtype) + batch.total(value - remembered)
        msg["done"] = True

    def _pyro_steps_taken(self, msg: Any) -> None:
        msg["value"], msg["done"] = self.latents.steps, True

    def _pyro_wanted_site(self, msg: Any) -> None:
        msg["value"], msg["done"] = self.keep, True

    def _pyro_release_graph(self, msg: Any) -> None:
        names = set(msg["args"])
        unknown = sorted(names - {term.name for term in self.terms})
        if unknown:
            raise InputError(
                f"release_graph() names {unknown}, which no statement before it does: those are "
                f"{[term.name for term in self.terms]}"
            )
        if self.release is not None:
            self.release([term for term in self.terms if term.name in names], self.released)
            self.released += sorted(names)
            self.terms = [
                term._replace(log_prob=term.log_prob.detach()) if term.name in names else term
                for term in self.terms
            ]
        msg["done"] = True

    def _pyro_running_mean(self, msg: Any) -> None:
        value, _, _ = msg["args"]
        state = self.latents.means[msg["name"]]
        if not self.ranks.alone:  # before the first step it is at once what all have
            value = value.clone() if state.count else self.ranks.mean(value)
        state.pending = value
        msg["value"] = state.mean() if state.count else value
        msg["done"] = True
