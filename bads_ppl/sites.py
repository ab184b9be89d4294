"""The latent values of a program, held in place between the steps of a stochastic-gradient kernel.

`Latents` runs a program once to find its sites and then keeps their values: parameters of networks
in the modules themselves, other global latents as tensors, and local latents of a subsampled
plate in tables with one row per point. `Latents.potential` runs the program on a minibatch with
these values in place and returns the potential energy, ready for `backward()`.

Everything here is on the unconstrained scale unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.distributions import Independent, Normal, constraints
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to

from bads_ppl.data import Batch
from bads_ppl.errors import InputError
from bads_ppl.primitives import Restart, Revert
from bads_ppl.program import Program


class NetworkSite:
    """The trainable parameters of one module, all in one group, with their priors."""

    def __init__(
        self, name: str, module: nn.Module, prior: Any, companion: Restart | Revert | None
    ) -> None:
        self.name = name
        self.module = module
        self.companion = companion
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise InputError(
                f"network {name!r} has no parameter with requires_grad=True, so nothing to "
                "sample: unfreeze some of its parameters"
            )
        self.names = [n for n, _ in named]
        self.parameters: list[Tensor] = [p for _, p in named]
        self.priors = [prior(n, p) for n, p in named]
        # The score of a zero-mean Gaussian with one scale is theta / scale^2: no autograd needed.
        scales = [zero_mean_scale(prior) for prior in self.priors]
        self.decay = None if None in scales else [1 / s**2 for s in scales if s is not None]
        self.moves: list[Tensor] | None = None  # of a Revert companion: m, theta' = theta + m
        self.part: list[Tensor] = []  # of a Revert companion: the plate's share of the gradient
        self.call: Callable[..., Any] = module
        if isinstance(companion, Revert):
            self.moves = [torch.zeros_like(p) for p in self.parameters]
            # It has no backward pass of its own.
            self.call = torch.no_grad()(lambda *args, **kwargs: module(*args, **kwargs))

    def log_prior(self) -> Tensor:
        """Log p(theta), () with its graph."""
        terms = [q.log_prob(p) for q, p in zip(self.priors, self.parameters, strict=True)]
        return torch.stack([term.sum() for term in terms]).sum()

    def gradients(self) -> list[Tensor]:
        """Gradient of the potential in each parameter, the closed-form prior included."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        if self.decay is not None:
            values = [p.detach() for p in self.parameters]
            if len(set(self.decay)) == 1:
                torch._foreach_add_(grads, values, alpha=self.decay[0])
            else:
                for grad, value, decay in zip(grads, values, self.decay, strict=True):
                    grad.add_(value, alpha=decay)
        return grads


def zero_mean_scale(prior: Any) -> float | None:
    """The scale of a Normal(0, scale) that is the same for all elements, else None."""
    while isinstance(prior, Independent):
        prior = prior.base_dist
    if not isinstance(prior, Normal):
        return None
    loc, scale = prior.loc, prior.scale
    if bool((loc != 0).any()) or bool((scale != scale.flatten()[0]).any()):
        return None
    return float(scale.flatten()[0])


@dataclass
class GlobalSite:
    """A latent outside of subsampled plates that is not a network's parameter."""

    value: Tensor  # leaf, unconstrained
    transform: Any  # unconstrained to constrained


@dataclass
class Table:
    """A local latent of a plate: one row per point, of which a step moves the batch's."""

    plate: str
    value: Tensor  # (N, ...), unconstrained
    transform: Any
    rows: Tensor | None = None  # leaf (B, ...): the rows of the batch in hand
    constrained: Tensor | None = None  # the same rows as the program saw them
    index: Tensor | None = None  # (B,)

    def values(self) -> Tensor:
        """All rows (N, ...) on the constrained scale."""
        result: Tensor = self.transform(self.value)
        return result


@dataclass
class PlateSum:
    """State of a `plate_sum`: the total, and for a computed value what each row had last."""

    total: Tensor  # (), float64 where the device has it
    table: str | None  # the local site whose values are summed
    memory: Tensor | None = None  # (N,) for computed values
    pending: tuple[Tensor, Tensor] | None = None  # index (B,) and value (B,) of this step

    def add(self, change: Tensor, share: Tensor | None) -> None:
        """Add the rows' changes (B,); `share` (B,) splits those of rows that occur repeatedly."""
        if share is not None:
            change = change * share
        self.total += change.sum(dtype=self.total.dtype)


@dataclass
class RunningMean:
    """State of a `running_mean`: the last values, or one decayed average."""

    kind: str
    window: int
    values: Tensor  # (window,) for "simple", (1,) for "exponential"
    count: int = 0
    pending: Tensor | None = None

    def mean(self) -> Tensor:
        if self.kind == "exponential":
            return self.values[0]
        return self.values[: min(self.count, self.window)].mean()

    def commit(self) -> None:
        if self.pending is None:
            return
        if self.kind == "exponential":
            share = max(1 / self.window, 1 / (self.count + 1))  # a plain average at first
            self.values.lerp_(self.pending.reshape(1), share)
        else:
            self.values[self.count % self.window] = self.pending
        self.count += 1
        self.pending = None


def _first_occurrence(index: Tensor) -> tuple[Tensor, Tensor]:
    """Of each entry, the position (B,) of the first equal one, and 1 / how often it occurs (B,)."""
    same = index[:, None] == index[None, :]
    return same.to(torch.uint8).argmax(dim=1), 1 / same.sum(dim=1)


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


def _total_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass
class Latents:
    """All latent values of a program, and the running statistics that its statements ask for.

    Args:
        program: the program.
        train: a batch to find the sites with.
        meta: likewise.
        generator: draws the initial values of global latents that have no `initial`.
    """

    program: Program
    networks: dict[str, NetworkSite] = field(default_factory=dict)
    globals: dict[str, GlobalSite] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    sums: dict[str, PlateSum] = field(default_factory=dict)
    means: dict[str, RunningMean] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)
    temperature: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def find(cls, program: Program, train: Batch, meta: Batch) -> Latents:
        """Run the program once on two batches and set up its sites.

        Global and local latents start at `infer={"initial": value}` (constrained) where the site
        says so, else at 0 on the unconstrained scale; networks at their present parameters.

        Raises:
            InputError: if a site is discrete, a network has nothing to sample, or there is no
                latent at all.
        """
        latents = cls(program)
        with torch.no_grad(), pyro.validation_enabled(False), _Find(latents):
            program(train, meta)
        if not (latents.networks or latents.globals or latents.tables):
            raise InputError("the program has no latent site: sample at least the network")
        for network in latents.networks.values():
            companion = network.companion
            if companion is not None and companion.network not in latents.networks:
                raise InputError(
                    f"network {network.name!r} accompanies {companion.network!r}, not a network "
                    f"of the program: it has {sorted(latents.networks)}"
                )
        return latents

    def groups(self) -> dict[str, str | None]:
        """Names of the groups that take a step size, with the group each falls back on."""
        found: dict[str, str | None] = {
            name: site.companion.network if site.companion else None
            for name, site in self.networks.items()
            if site.moves is None
        }
        return found | dict.fromkeys([*self.globals, *self.tables])

    def _evaluate(self, train: Batch, meta: Batch) -> _Evaluate:
        with pyro.validation_enabled(False), _Evaluate(self) as run:
            self.program(train, meta)
        for network in self.networks.values():
            if network.decay is None and network.moves is None:
                run.add(f"{network.name}.prior", network.log_prior(), frozenset())
        self.terms = run.terms
        return run

    def potential(self, train: Batch, meta: Batch) -> Tensor:
        """Minibatch estimate () of the potential, with its graph; terms are kept in `terms`.

        Network priors with a closed-form score are left out here and enter with
        `NetworkSite.gradients`.
        """
        return -torch.stack(self._evaluate(train, meta).log_probs).sum()

    def backward(self, train: Batch, meta: Batch) -> Tensor:
        """Gradients of `potential` in all latents; returns its value (), detached.

        Companions that take back the moves due to a plate get that plate's share of the gradient.
        """
        self.zero_grad()
        reverts = [site for site in self.networks.values() if site.moves is not None]
        if not reverts:
            potential = self.potential(train, meta)
            potential.backward()
            return potential.detach()
        (site,) = reverts
        assert isinstance(site.companion, Revert)
        run = self._evaluate(train, meta)
        inside = [site.companion.plate in plates for plates in run.plates]
        pairs = list(zip(run.log_probs, inside, strict=True))
        part = -torch.stack([term for term, i in pairs if i]).sum()
        rest = -torch.stack([term for term, i in pairs if not i]).sum()
        part.backward(retain_graph=True)  # a program may share one forward pass
        accompanied = self.networks[site.companion.network].parameters
        site.part = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in accompanied]
        rest.backward()
        return (part + rest).detach()

    @contextmanager
    def _still(self) -> Iterator[None]:
        """A look that leaves no trace: networks in eval mode keep their running statistics."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(pyro.validation_enabled(False))
            for network in self.networks.values():
                stack.enter_context(evaluation_mode(network.module))
            yield

    def joint_potential(self, train: Batch, meta: Batch) -> Tensor:
        """The potential () with all priors, without graph and without companions' terms.

        Terms of a companion network are the sites whose names begin with its name.

        Networks are in eval mode, as they are in `values`.
        """
        companions = [f"{name}_" for name, site in self.networks.items() if site.companion]
        with self._still(), _Evaluate(self) as run:
            self.program(train, meta)
            log_joint = torch.stack(
                [
                    term
                    for name, term in zip(run.names, run.log_probs, strict=True)
                    if not name.startswith(tuple(companions))
                ]
            ).sum()
            for network in self.networks.values():
                if network.companion is None:
                    log_joint = log_joint + network.log_prior()
        self.drop_pending()
        return -log_joint

    def values(self, site: str, train: Batch, meta: Batch) -> Tensor:
        """Values (B,) of a local site, latent or computed, for the batch's rows; constrained.

        Raises:
            InputError: if the program has no such site.
        """
        with self._still(), _Evaluate(self, keep=site) as run:
            self.program(train, meta)
        self.drop_pending()
        if run.kept is None:
            raise InputError(f"the program has no site {site!r}")
        return run.kept

    def zero_grad(self) -> None:
        for network in self.networks.values():
            for parameter in network.parameters:
                parameter.grad = None
        for site in self.globals.values():
            site.value.grad = None

    @torch.no_grad()
    def move_rows(self, table_name: str, new: Tensor, *, distinct: bool) -> None:
        """Write the batch's rows of a table and keep the totals exact.

        Where a row occurs twice, its first occurrence counts.
        """
        table = self.tables[table_name]
        assert table.index is not None and table.constrained is not None
        share = None
        if not distinct:
            first, share = _first_occurrence(table.index)
            new = new[first]
        table.value[table.index] = new
        for plate_sum in self.sums.values():
            if plate_sum.table == table_name:
                plate_sum.add(table.transform(new) - table.constrained.detach(), share)

    @torch.no_grad()
    def finish_step(self, step: int, *, distinct: bool) -> None:
        """After all groups moved: commit statistics, restart companions. `step` counts from 1."""
        for mean in self.means.values():
            mean.commit()
        for plate_sum in self.sums.values():
            if plate_sum.pending is None or plate_sum.memory is None:
                continue
            index, value = plate_sum.pending
            share = None
            if not distinct:
                first, share = _first_occurrence(index)
                value = value[first]
            plate_sum.add(value - plate_sum.memory[index], share)
            plate_sum.memory[index] = value
            plate_sum.pending = None
        for network in self.networks.values():
            companion = network.companion
            if companion is None:
                continue
            if isinstance(companion, Restart) and (
                companion.every is None or step % companion.every
            ):
                continue
            other = self.networks[companion.network]
            torch._foreach_copy_(network.parameters, other.parameters)
            if network.moves is not None:
                torch._foreach_add_(network.parameters, network.moves)
            for mine, theirs in zip(network.module.buffers(), other.module.buffers(), strict=True):
                mine.copy_(theirs)

    def drop_pending(self) -> None:
        """Forget the statistics of an evaluation that is not a step."""
        for plate_sum in self.sums.values():
            plate_sum.pending = None
        for mean in self.means.values():
            mean.pending = None

    # State for checkpoints: every tensor by name, in a fixed order.

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of the state; the tensors are the live ones."""
        for name, network in self.networks.items():
            for parameter, tensor in zip(network.names, network.parameters, strict=True):
                yield f"network/{name}/{parameter}", tensor
            for buffer, tensor in network.module.named_buffers():
                yield f"buffer/{name}/{buffer}", tensor
        for name, site in self.globals.items():
            yield f"global/{name}", site.value
        for name, table in self.tables.items():
            yield f"table/{name}", table.value
        for name, plate_sum in self.sums.items():
            yield f"sum/{name}/total", plate_sum.total
            if plate_sum.memory is not None:
                yield f"sum/{name}/memory", plate_sum.memory
        for name, mean in self.means.items():
            yield f"mean/{name}/values", mean.values
        for name, network in self.networks.items():
            for parameter, tensor in zip(network.names, network.moves or [], strict=False):
                yield f"moves/{name}/{parameter}", tensor

    def state_dict(self) -> dict[str, Tensor]:
        state = {name: tensor.detach().clone() for name, tensor in self.tensors()}
        for name, mean in self.means.items():
            state[f"mean/{name}/count"] = torch.tensor(mean.count)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            InputError: if names or shapes differ: the state is that of another program.
        """
        mine = dict(self.tensors())
        wanted = set(mine) | {f"mean/{name}/count" for name in self.means}
        if wanted != set(state):
            differ = sorted(wanted ^ set(state))[:3]
            raise InputError(
                f"the checkpoint belongs to another program: sites differ, such as {differ}. "
                "Resume with the settings of the first run, or start anew in another run_dir"
            )
        with torch.no_grad():
            for name, tensor in mine.items():
                if tensor.shape != state[name].shape:
                    raise InputError(
                        f"the checkpoint belongs to another program: {name} has shape "
                        f"{tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
                    )
                tensor.copy_(state[name])
        for name, mean in self.means.items():
            mean.count = int(state[f"mean/{name}/count"])


class _Find(Messenger):
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
        if plates:
            (frame,) = plates
            rows = (frame.full_size, *unconstrained.shape[1:])
            value = unconstrained[:1].expand(rows).clone()
            self.latents.tables[name] = Table(frame.name, value, transform)
            msg["value"] = transform(value[: frame.size])
        else:
            value = unconstrained.clone().requires_grad_()
            self.latents.globals[name] = GlobalSite(value, transform)
            msg["value"] = transform(value.detach())
        self.seen[name] = msg["value"]

    def _pyro_plate_sum(self, msg: Any) -> None:
        value, batch = msg["args"]
        dtype = _total_dtype(value.device)
        for name, table in self.latents.tables.items():
            if value is self.seen[name]:
                total = table.values().sum(dtype=dtype)
                self.latents.sums[msg["name"]] = PlateSum(total, name)
                return
        mean = value.detach().mean()
        memory = mean.expand(batch.size).clone()
        total = memory.sum(dtype=dtype)
        self.latents.sums[msg["name"]] = PlateSum(total, None, memory)

    def _pyro_running_mean(self, msg: Any) -> None:
        value, window, kind = msg["args"]
        size = window if kind == "simple" else 1
        values = torch.zeros(size, dtype=value.dtype, device=value.device)
        self.latents.means[msg["name"]] = RunningMean(kind, window, values)


class _Evaluate(Messenger):
    """Runs a program with the latents' values in place and collects its log-probabilities."""

    def __init__(self, latents: Latents, *, keep: str | None = None) -> None:
        super().__init__()
        self.latents = latents
        self.keep = keep
        self.kept: Tensor | None = None
        self.index: dict[str, Tensor] = {}
        self.names: list[str] = []
        self.log_probs: list[Tensor] = []  # (), scaled
        self.plates: list[frozenset[str]] = []
        self.terms: dict[str, Tensor] = {}  # not scaled

    def _pyro_network(self, msg: Any) -> None:
        msg["value"] = self.latents.networks[msg["args"][2]].call
        msg["done"] = msg["stop"] = True

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
            rows = table.value[table.index].requires_grad_(torch.is_grad_enabled())
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
        if site_is_subsample(msg) or "_deterministic" in msg["infer"]:
            return
        log_prob = msg["fn"].log_prob(msg["value"])
        if not msg["is_observed"]:
            log_prob = log_prob + self._log_jacobian(name, msg["value"])
        self.terms[name] = log_prob.detach()
        plates = frozenset(frame.name for frame in msg["cond_indep_stack"])
        self.add(name, scale_and_mask(log_prob, msg["scale"], msg["mask"]).sum(), plates)

    def add(self, name: str, log_prob: Tensor, plates: frozenset[str]) -> None:
        self.names.append(name)
        self.log_probs.append(log_prob)
        self.plates.append(plates)

    def _log_jacobian(self, name: str, value: Tensor) -> Tensor | float:
        """T log|dx/du|: at temperature T the target is p(x)^(1/T) on the constrained scale."""
        temperature = self.latents.temperature.get(name, 1.0)
        if temperature == 0:
            return 0.0
        table = self.latents.tables.get(name)
        site = table if table is not None else self.latents.globals[name]
        unconstrained = table.rows if table is not None else site.value
        jacobian: Tensor = site.transform.log_abs_det_jacobian(unconstrained, value)
        return temperature * jacobian

    def _pyro_plate_sum(self, msg: Any) -> None:
        value, batch = msg["args"]
        state = self.latents.sums[msg["name"]]
        if state.table is not None:
            remembered = value.detach()
        else:
            assert state.memory is not None
            remembered = state.memory[batch.index]
            state.pending = (batch.index, value.detach())
        msg["value"] = state.total.to(value.dtype) + batch.total(value - remembered)
        msg["done"] = True

    def _pyro_running_mean(self, msg: Any) -> None:
        value, _, _ = msg["args"]
        state = self.latents.means[msg["name"]]
        state.pending = value
        msg["value"] = state.mean() if state.count else value
        msg["done"] = True


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, as it was afterwards."""
    was = [(part, part.training) for part in module.modules()]  # parts may differ
    module.eval()
    try:
        yield
    finally:
        for part, training in was:
            part.training = training
