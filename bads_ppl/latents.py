"""The latent values of a program, held in place between the steps of a stochastic-gradient kernel.

`Latents` runs a program once to find its sites and then keeps their values: parameters of networks
in the modules themselves, other global latents as tensors, and local latents of a subsampled
plate in tables with one row per point. `Latents.potential` runs the program on a minibatch with
these values in place and returns the potential energy, ready for `backward()`.

Everything here is on the unconstrained scale unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from bads_ppl.data import Batch
from bads_ppl.errors import InputError
from bads_ppl.primitives import Revert
from bads_ppl.program import Program
from bads_ppl.sites import (
    GlobalSite,
    Logit,
    NetworkSite,
    PlateSum,
    Repeats,
    RunningMean,
    Table,
    drops,
    evaluation_mode,
)
from bads_ppl.tracing import Evaluate, Find, Outputs, Reached, Seeds, Term, Told


@dataclass
class Latents:
    """All latent values of a program, and the running statistics that its statements ask for.

    Args:
        program: the program.
        train: a batch to find the sites with.
        meta: likewise.
        folder: for files that hold tables of local latents; None: memory holds them.
    """

    program: Program
    networks: dict[str, NetworkSite] = field(default_factory=dict)
    globals: dict[str, GlobalSite] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    sums: dict[str, PlateSum] = field(default_factory=dict)
    means: dict[str, RunningMean] = field(default_factory=dict)
    told: Told = field(default_factory=lambda: Told({}, {}))  # of the last evaluation
    temperature: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    changes: bool = False  # the program asks for the number of steps
    folder: Path | None = None
    seeds: Seeds = field(default_factory=Seeds)

    @classmethod
    def find(
        cls, program: Program, train: Batch, meta: Batch, folder: Path | None = None
    ) -> Latents:
        """Run the program once on two batches and set up its sites.

        Global and local latents start at `infer={"initial": value}` (constrained) where the site
        says so, else at 0 on the unconstrained scale; networks at their present parameters.

        Raises:
            InputError: if a site is discrete, a network has nothing to sample, there is no latent
                at all, or a companion network drops units at random.
        """
        latents = cls(program, folder=folder)
        with torch.no_grad(), pyro.validation_enabled(False), Find(latents):
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
            if companion is not None and drops(network.module):
                raise InputError(
                    f"network {network.name!r} is compared with {companion.network!r}, and their "
                    "dropout layers would differ in what they drop: set p=0 of them (the prior of "
                    "the parameters regularises), or take a program without a companion, such as "
                    "model=joint"
                )
        reverts = [name for name, site in latents.networks.items() if site.moves is not None]
        if len(reverts) > 1:
            raise InputError(
                f"a program can have one Revert companion, got {reverts}: make the others Restart"
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

    def _evaluate(
        self,
        train: Batch,
        meta: Batch,
        held: Outputs | None = None,
        release: Callable[[list[Term], list[str]], None] | None = None,
    ) -> Evaluate:
        look = Evaluate(self, replay=held, release=release, ranks=train.ranks)
        with pyro.validation_enabled(False), look as run:
            self.program(train, meta)
        for network in self.networks.values():
            if network.decay is None and network.moves is None:
                run.terms.append(Term(f"{network.name}.prior", network.log_prior(), 1.0))
        self.told = run.told()
        return run

    @property
    def terms(self) -> dict[str, Tensor]:
        """Log-probabilities by statement that the last evaluation found, not scaled."""
        return self.told.terms

    @property
    def has_density(self) -> bool:
        """Whether the drift is the gradient of one density.

        Companion networks make it another, and so does a program that changes with the steps.
        """
        companions = any(network.companion is not None for network in self.networks.values())
        return not (companions or self.changes)

    def potential(self, train: Batch, meta: Batch) -> Tensor:
        """Minibatch estimate () of the potential, with its graph; what it found is in `told`.

        Network priors with a closed-form score are left out here and enter with
        `NetworkSite.gradients`.
        """
        terms = self._evaluate(train, meta).terms
        if not terms:
            return torch.zeros((), requires_grad=True)
        return -torch.stack([term.total() for term in terms]).sum()

    def outputs(self, train: Batch, meta: Batch) -> Outputs:
        """The networks' outputs for a batch, with their graph, for `backward_rows`, `backward`."""
        look = Evaluate(self, hold=True, ranks=train.ranks)
        with pyro.validation_enabled(False), look as run:
            self.program(train, meta)
        return run.held

    def backward(self, train: Batch, meta: Batch, held: Outputs | None = None) -> None:
        """Gradients of `potential` in all latents.

        Companions that take back the moves due to a plate get that plate's share of the gradient.
        Networks are not called again where their outputs are given. Where several processes have a
        share of the batches, all is of the batches as a whole, in each of them.

        Raises:
            InputError: if the program differentiates through a graph that it has released.
        """
        self.zero_grad()
        reverts = [site for site in self.networks.values() if site.moves is not None]
        # Their plate's share of the gradient is told apart at the end.
        run = self._evaluate(train, meta, held, None if reverts else self._differentiate)
        rest = run.terms
        for site in reverts:  # one at most
            assert isinstance(site.companion, Revert)
            plate = site.companion.plate
            part = [term for term in run.terms if plate in term.plates]
            rest = [term for term in run.terms if plate not in term.plates]
            self.seeds.backward(part, retain_graph=True)  # a program may share one forward pass
            site.part = [x.clone() for x in self.networks[site.companion.network].slopes()]
        self._differentiate(rest, run.released)
        if not train.ranks.alone:
            self._join(train, meta)

    def _differentiate(self, terms: list[Term], released: list[str]) -> None:
        """Add gradients of terms, some time after those of the sites in `released` were taken."""
        try:
            self.seeds.backward(terms)
        except RuntimeError as failure:
            if not released or "a second time" not in str(failure):
                raise
            names = [term.name for term in terms if term.log_prob.requires_grad]
            raise InputError(
                f"a statement among {names} is differentiated through what led to one among "
                f"{released}, whose graph release_graph() let go of: detach() what they share, or "
                "leave release_graph() out"
            ) from failure

    def _join(self, train: Batch, meta: Batch) -> None:
        """Gradients and statistics become means over processes."""
        every = [one.pending for one in self.means.values() if one.pending is not None]
        leaves: list[Tensor] = []
        for network in self.networks.values():
            every += network.statistics()
            if network.shards is None:  # else they are means already
                every += network.part
                leaves += [] if network.moves is not None else network.parameters
        for leaf in leaves + [site.value for site in self.globals.values()]:
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
            every.append(leaf.grad)
        train.ranks.mean_(every)
        self._join_rows(train, meta)

    def _join_rows(self, train: Batch, meta: Batch) -> None:
        if train.ranks.alone:
            return
        for table in self.tables.values():
            if table.rows is not None:
                table.share_moves(train, meta)

    def backward_rows(self, train: Batch, meta: Batch, held: Outputs) -> None:
        """Gradients in the batch's rows of tables, given the networks' outputs."""
        held = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, held)
        look = Evaluate(self, replay=held, ranks=train.ranks)
        with pyro.validation_enabled(False), look as run:
            self.program(train, meta)
        rows = [table.rows for table in self.tables.values() if table.rows is not None]
        total = torch.stack([term.total() for term in run.terms]).sum()
        grads = torch.autograd.grad(-total, rows)
        for row, grad in zip(rows, grads, strict=True):
            row.grad = grad
        self._join_rows(train, meta)

    @contextmanager
    def still(self) -> Iterator[None]:
        """A look that leaves no trace: networks in eval mode keep their running statistics.

        What a program draws from torch's global generator, on the CPU, is drawn again afterwards.
        """
        with ExitStack() as stack:
            stack.enter_context(pyro.validation_enabled(False))
            stack.enter_context(torch.random.fork_rng(devices=[]))
            for network in self.networks.values():
                stack.enter_context(evaluation_mode(network.module))
            yield

    def joint_potential(self, train: Batch, meta: Batch) -> Tensor:
        """The potential () with all priors, without graph and without companions' terms.

        Terms of a companion network are the sites whose names begin with its name.

        Networks are in eval mode, as they are in `values`.
        """
        companions = [f"{name}_" for name, site in self.networks.items() if site.companion]
        with torch.no_grad(), self.still(), Evaluate(self) as run:
            self.program(train, meta)
            log_joint = torch.stack(
                [term.total() for term in run.terms if not term.name.startswith(tuple(companions))]
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
        with torch.no_grad(), self.still(), Evaluate(self, keep=site) as run, suppress(Reached):
            self.program(train, meta)
        self.drop_pending()
        if run.kept is None:
            raise InputError(f"the program has no site {site!r}")
        return run.kept

    def total(self, site: str) -> Tensor | None:
        """Sum () over a local site's plate; of a computed one that of a `plate_sum`, if any."""
        table = self.tables.get(site)
        totals = {one.table: one.total for one in self.sums.values()}
        total = totals.get(site if table else None)
        return table.total() if table and total is None else total

    def zero_grad(self) -> None:
        for network in self.networks.values():
            for parameter in network.leaves:
                parameter.grad = None
        for site in self.globals.values():
            site.value.grad = None

    @torch.no_grad()
    def move_rows(self, table_name: str, new: Tensor, repeats: Repeats | None = None) -> None:
        """Write the batch's rows of a table and keep the totals exact.

        Where a row occurs repeatedly, its first occurrence counts.
        """
        table = self.tables[table_name]
        assert table.index is not None and table.constrained is not None
        share = None
        if repeats is not None:
            first, share = repeats
            new = new[first]
        if isinstance(table.transform, Logit):
            new = table.transform.inside(new)
        table.value.index_copy_(0, table.index, new)
        for plate_sum in self.sums.values():
            if plate_sum.table == table_name:
                plate_sum.add(table.transform(new) - table.constrained.detach(), share)

    def prepare_step(self) -> None:
        """Before a step: what it depends on beside its constants, put where a graph reads it."""
        for mean in self.means.values():
            mean.prepare()

    def constants(self, step: int) -> tuple[Any, ...]:
        """What step `step` (from 1) depends on beside tensors."""
        copied = tuple(site.copied_after(step) for site in self.networks.values())
        return (copied, *(mean.constants for mean in self.means.values()))

    @torch.no_grad()
    def commit_means(self) -> list[RunningMean]:
        """After all groups moved: running means take in their values; returns those that did."""
        return [mean for mean in self.means.values() if mean.commit()]

    def count_step(self, means: list[RunningMean]) -> None:
        """Count a step that these means took a value in."""
        self.steps += 1
        for mean in means:
            mean.count += 1

    @torch.no_grad()
    def finish_step(self, step: int, repeats: Repeats | None = None) -> list[tuple[str, str]]:
        """After all groups moved: commit sums, restart companions. `step` counts from 1.

        Returns the names of companions that were copied, each with the network it was copied from.
        """
        copied: list[tuple[str, str]] = []
        for plate_sum in self.sums.values():
            if plate_sum.pending is None or plate_sum.memory is None:
                continue
            index, value = plate_sum.pending
            share = None
            if repeats is not None:
                first, share = repeats
                value = value[first]
            plate_sum.add(value - plate_sum.memory[index], share)
            plate_sum.memory[index] = value
            plate_sum.pending = None
        for network in self.networks.values():
            if not network.copied_after(step):
                continue
            assert network.companion is not None
            other = self.networks[network.companion.network]
            torch._foreach_copy_(network.parameters, other.parameters)
            if network.moves is not None:
                torch._foreach_add_(network.parameters, network.moves)
            else:
                copied.append((network.name, other.name))
            for mine, theirs in zip(network.module.buffers(), other.module.buffers(), strict=True):
                mine.copy_(theirs)
        return copied

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
