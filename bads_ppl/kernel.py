"""What every stochastic-gradient kernel shares: data, groups of sites, minibatches, checkpoints.

A step draws a minibatch of each plate, takes the gradient of the potential U in all latents, and
moves group after group (`bads_ppl.moves`): networks, other global latents, the batch's rows of
local latents. U is minus the log joint, a sum over the data.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from bads_ppl.adaptation import Adaptation
from bads_ppl.data import Data
from bads_ppl.errors import Diverged, InputError, RanksError
from bads_ppl.graphs import Graphs, Outcome, obstacle
from bads_ppl.joining import step_batches
from bads_ppl.latents import Latents
from bads_ppl.minibatches import ImportanceMinibatches, UniformMinibatches, check_batch_size
from bads_ppl.moves import Moves
from bads_ppl.primitives import Revert
from bads_ppl.program import Program
from bads_ppl.ranks import ALONE, Ranks
from bads_ppl.schedules import Schedule, by_group
from bads_ppl.shards import Shards
from bads_ppl.sites import first_occurrence
from bads_ppl.stiffness import check_stiffness
from bads_ppl.weights import SITE

T = TypeVar("T")


class MinibatchKernel(Moves):
    """Samples all latent sites of a program from minibatches; the samplers' common part.

    Runs in `pyro.infer.MCMC(kernel, ...).run(train, meta)` and in `bads_ppl.chains`.
    The parameters of networks live in the modules themselves and are updated in place.

    Args:
        program: `program(train, meta)`, see `bads_ppl.program`.
        step_size: eta, a number or a schedule, for all groups or per group. Groups are "theta",
            "phi", other networks, and the names of other latent sites such as "w". A companion
            network falls back on the network it accompanies. For local sites eta is the step
            of a row when it is visited; with importance minibatches it is multiplied by the row's
            correction, so that being visited more often does not speed a row up.
        temperature: T >= 0, for all groups or per group (1 for groups not named). 1 targets the
            posterior, other values p^(1/T), 0 is gradient descent. With different temperatures
            the chain follows no single density (theta close to its mode, w still uncertain).
        mode: "calibrated" adds noise of standard deviation sqrt(eta T). "paper" adds noise of
            standard deviation 1e-5, as the paper ran it: close to a point estimate, never
            posterior evidence.
        clip: longest drift eta / 2 |G grad U| of a step, for all groups or per group: of the whole
            group for networks, of each row for local sites. It keeps a chain from jumps; since
            the drift shrinks with eta and the bound does not, its bias vanishes with the step
            (Brosse et al., 2019). `diagnostics` gives the share of steps after warm-up in which it
            acted.
        train_batch: rows of the train set per step; None: min(100, N_t).
        meta_batch: rows of the meta set per step; None: min(50, N_m).
        minibatches: "uniform", or "importance": half of the train rows are drawn in proportion to
            w, with the unbiased correction.
        bucket: batches that are cut together from rows in the order of length, where a set has
            lengths and its minibatches are uniform (`UniformMinibatches`); None: none.
        local_steps: steps that the batch's rows of local sites take per step of the networks: all
            but the last come first, given the networks' outputs, then all groups move together.
            Rows are visited rarely, and this lets them use a visit in full; each step is one of
            its own conditional, so the target is the same.
        target_acceptance: in (0, 1): during warm-up multiply each group's step size so that its
            Metropolis-adjusted acceptance rate on the minibatch comes near this value; frozen
            afterwards. None: step sizes stay as given.
        thinning: steps per draw, warm-up draws too, when run by `pyro.infer.MCMC`.
        cuda_graph: record steps as CUDA graphs (`bads_ppl.graphs`); they do the same, sooner, and
            hold the memory of a step. None: where that is possible, which is on CUDA, in one
            process, where nothing in a step waits for the device, and where the program does not
            ask for the number of steps. What such a program, its networks and an `augment` do may
            depend on tensors only, and random numbers must come from torch, on the device. What a
            draw records of theta is then recorded, too, where nothing in it waits for the device,
            in memory of its own. True: steps are recorded, or an error. False: never.
        folder: for files that hold local latents in place of memory (`bads_ppl.sites.new_table`).
        generator: source of data order and noise, on the device of the data.
        ranks: the processes that run this chain together, each on a share of every batch; all of
            them need the same program, data and generator (`bads_ppl.ranks`).

    Raises:
        InputError: for values outside of the ranges above.
    """

    def __init__(
        self,
        program: Program,
        *,
        step_size: float | Schedule | Mapping[str, float | Schedule],
        generator: torch.Generator,
        temperature: float | Mapping[str, float] = 1.0,
        mode: Literal["calibrated", "paper"] = "calibrated",
        clip: float | Mapping[str, float] | None = None,
        train_batch: int | None = None,
        meta_batch: int | None = None,
        minibatches: Literal["uniform", "importance"] = "uniform",
        bucket: int | None = None,
        local_steps: int = 1,
        target_acceptance: float | None = None,
        thinning: int = 1,
        cuda_graph: bool | None = None,
        folder: Path | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        for value in temperature.values() if isinstance(temperature, Mapping) else [temperature]:
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"temperature must be a finite number >= 0, got {value}")
        if mode not in ("calibrated", "paper"):
            raise InputError(f"mode must be 'calibrated' or 'paper', got {mode!r}")
        for bound in clip.values() if isinstance(clip, Mapping) else [clip]:
            if bound is not None and not bound > 0:
                raise InputError(f"clip must be a positive number, or None for none, got {bound}")
        if minibatches not in ("uniform", "importance"):
            raise InputError(f"minibatches must be 'uniform' or 'importance', got {minibatches!r}")
        if bucket is not None and bucket < 1:
            raise InputError(f"bucket must be at least 1 batch, got {bucket}")
        if local_steps < 1:
            raise InputError(f"local_steps must be at least 1 step per visit, got {local_steps}")
        if target_acceptance is not None and not 0 < target_acceptance < 1:
            raise InputError(
                f"target_acceptance must be in (0, 1), got {target_acceptance}: 0.8, say"
            )
        if thinning < 1:
            raise InputError(f"thinning must be at least 1 step per draw, got {thinning}")
        self.program = program
        self.step_size = step_size
        self.temperature = temperature
        self.mode = mode
        self.clip = clip
        self.train_batch = train_batch
        self.meta_batch = meta_batch
        self.minibatches = minibatches
        self.bucket = bucket or 1
        self.local_steps = local_steps
        self.target_acceptance = target_acceptance
        self.thinning = thinning
        self.cuda_graph = cuda_graph
        self.folder = folder
        self.generator = generator
        self.ranks = ranks
        self.steps = 0
        self.graphs: Graphs[Outcome] | None = None
        self.looks: dict[Any, Graphs[Any]] = {}
        self._process = os.getpid()

    @property
    def recorded(self) -> bool:
        """Whether steps are replayed from CUDA graphs."""
        return self.graphs is not None and bool(self.graphs.graphs)

    def draws_at(self, step: int) -> bool:
        """Whether the state after `step` steps (from 1) may be a draw."""
        return True

    # state

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Find the program's sites and start the minibatches; args are the train and meta `Data`.

        Raises:
            InputError: if the arguments are not two `Data`, a batch is larger than its set or not
                a multiple of the number of processes, or a group has no step size.
        """
        if len(args) != 2 or kwargs or not all(isinstance(a, Data) for a in args):
            raise InputError(
                f"{type(self).__name__} draws its own minibatches: run it with the train and meta "
                "sets, as in MCMC(kernel, ...).run(Data(...), Data(...))"
            )
        if os.getpid() != self._process:
            # MCMC starts each chain as a copy of this kernel: without this all would be the same.
            self.generator.manual_seed(torch.initial_seed())
        self.warmup_steps = warmup_steps * self.thinning  # MCMC counts in draws
        self.train, self.meta = args
        train_batch = min(100, len(self.train)) if self.train_batch is None else self.train_batch
        meta_batch = min(50, len(self.meta)) if self.meta_batch is None else self.meta_batch
        check_batch_size(train_batch, len(self.train), "train")
        check_batch_size(meta_batch, len(self.meta), "meta")
        self.ranks.check_share(train_batch, len(self.train), "train")
        self.ranks.check_share(meta_batch, len(self.meta), "meta")
        rows = [torch.arange(n, device=self.train.device) for n in (train_batch, meta_batch)]
        self.latents = Latents.find(
            self.program, self.train.batch(rows[0]), self.meta.batch(rows[1]), self.folder
        )
        groups = self.latents.groups()
        self.schedules = by_group(self.step_size, groups)
        self.temperatures = self._per_group("temperature", self.temperature, groups, 1.0)
        if self.mode == "paper":
            self.temperatures = dict.fromkeys(groups, 0.0)
        self.clips = self._per_group("clip", self.clip, groups, None)
        self.clipped = {
            group: torch.zeros((), device=self.train.device)
            for group, bound in self.clips.items()
            if bound is not None
        }
        self.latents.temperature = self.temperatures
        self.adaptation = Adaptation(self.target_acceptance, list(groups))
        self.states = {group: self.init(group, self._values(group)) for group in groups}
        self.meta_rows = UniformMinibatches(
            len(self.meta), meta_batch, self.generator, self.meta.lengths, self.bucket
        )
        self.train_rows: UniformMinibatches | ImportanceMinibatches
        if self.minibatches == "uniform":
            self.train_rows = UniformMinibatches(
                len(self.train), train_batch, self.generator, self.train.lengths, self.bucket
            )
        else:
            table = self.latents.tables.get(SITE)
            if table is None:
                raise InputError(
                    f"minibatches='importance' needs one latent weight per point, at site {SITE!r}:"
                    " use weights=instance, or minibatches='uniform'"
                )
            self.train_rows = ImportanceMinibatches(
                len(self.train), train_batch, self.generator, table.values
            )
        self.check_adaptation()
        self.drop_graphs()
        needed = obstacle(self.train.device, self.ranks, self.latents)
        if self.cuda_graph and needed:
            raise InputError(f"cuda_graph=true needs {needed}: leave the option out")
        if needed is None and self.cuda_graph is not False:
            self.graphs = Graphs(
                *(self._update, self.generator, self._tensors, self.train.device),
                needed=self.cuda_graph is True,
            )

    def constants(self) -> tuple[Any, ...]:
        return (*super().constants(), self.latents.constants(self.steps + 1))

    def check_adaptation(self) -> None:
        """Refuse to adapt what has no density or no warm-up."""
        if self.target_acceptance is None:
            return
        if self.warmup_steps < 1:
            raise InputError(
                "target_acceptance adapts step sizes in burn-in, got a burn-in of 0 steps: give "
                "some, or leave target_acceptance out"
            )
        if not self.latents.has_density:
            raise InputError(
                "target_acceptance needs a program with a density, and this one has a companion "
                "network or changes with the steps: use model=joint, or leave target_acceptance out"
            )
        if self.sharded:
            raise InputError(
                "target_acceptance cannot adapt the step of a sharded network: leave it out, or "
                "take parallel=data"
            )

    def _values(self, group: str) -> list[Tensor]:
        """All values of a group, of a table every row."""
        latents = self.latents
        if group in latents.networks:
            return latents.networks[group].parameters
        site = latents.globals[group] if group in latents.globals else latents.tables[group]
        return [site.value]

    def _per_group(
        self, name: str, given: Any, groups: Mapping[str, str | None], default: Any
    ) -> dict[str, Any]:
        """One value per group from one for all or a mapping; companions follow their network."""
        if not isinstance(given, Mapping):
            return dict.fromkeys(groups, given)
        unknown = sorted(set(given) - set(groups))
        if unknown:
            raise InputError(
                f"{name} names groups {unknown} that the program does not have: its groups are "
                f"{sorted(groups)}"
            )
        return {
            group: given.get(group, given.get(other, default) if other else default)
            for group, other in groups.items()
        }

    # update

    def step(self) -> None:
        """One step of all groups.

        No value is read back to the host but before the first step and where step sizes adapt.

        Raises:
            InputError: before the first step, if a step size is too large for the curvature.
        """
        if self.steps == 0:
            check_stiffness(self)
        rows, meta = self.train_rows.next(), self.meta_rows.next().index
        self.latents.prepare_step()
        if self.graphs is None:
            outcome = self._update(rows.index, meta, rows.importance)
        else:
            adapts = self.target_acceptance is not None and self.steps < self.warmup_steps
            constants = None if adapts else self.constants()
            outcome = self.graphs.run(constants, rows.index, meta, rows.importance)
        self.latents.told = outcome.told
        self.latents.count_step(outcome.means)
        self.steps += 1
        if self.steps <= self.warmup_steps:
            self.adaptation.update(self, rows.index, meta)
            if self.steps == self.warmup_steps:
                self.end_warmup()
                if self.graphs is not None:
                    self.graphs.forget()
                    self.looks.clear()

    def _update(self, rows: Tensor, meta_rows: Tensor, importance: Tensor | None) -> Outcome:
        """Move all groups on a minibatch; nothing that a replayed graph would leave out."""
        sets = self.train, rows, self.meta, meta_rows
        train, meta = (
            batch.shared(self.ranks) for batch in step_batches(*sets, self.generator, importance)
        )
        latents = self.latents
        repeats = None if importance is None else first_occurrence(rows)
        held = None
        if latents.tables and self.local_steps > 1:
            held = latents.outputs(train, meta)
            for _ in range(self.local_steps - 1):
                latents.backward_rows(train, meta, held)
                with torch.no_grad():
                    self._move_tables(train.whole, repeats)
        latents.backward(train, meta, held)
        with torch.no_grad():
            self._move_networks()
            for name, site in latents.globals.items():
                assert site.value.grad is not None
                self._move(name, [site.value], [site.value.grad], self.states[name])
            self._move_tables(train.whole, repeats)
        means = latents.commit_means()
        for name, other in latents.finish_step(self.steps + 1, repeats):
            for key, kept in self.states[other].items():
                torch._foreach_copy_(self.states[name][key], kept)
        return Outcome(latents.told, means)

    # what the outside sees

    def look(self, function: Callable[[Latents], T]) -> T:
        """A function of the state that changes nothing of it, such as those that a draw records.

        It is replayed from a CUDA graph where steps are, if nothing in it waits for the device:
        beside tensors it may depend only on how many values the program's running means hold. It
        must be the same object every time, or equal to it, as bound methods are; tensors that it
        returns are good until it is looked at again.
        """
        if not self.recorded:  # a program that draws numbers on the host has shown it in a step
            return function(self.latents)
        if function not in self.looks:
            self.looks[function] = Graphs(
                *(partial(function, self.latents), self.generator, self._tensors),
                self.train.device,
                what="draw",
            )
        found: T = self.looks[function].run(
            tuple(mean.kept for mean in self.latents.means.values())
        )
        return found

    def drop_graphs(self) -> None:
        """Record nothing from here to the next `setup`; let go of the memory of what was."""
        self.graphs = None
        self.looks.clear()

    @property
    def potential(self) -> Tensor:
        """The potential () before the last step, on its minibatch, without closed-form priors."""
        return self.latents.told.potential()

    def check_finite(self) -> None:
        """Refuse to go on from a non-finite state (reads from the device).

        Raises:
            Diverged: with the step sizes in use and those to try.
        """
        state = [self.potential] + [table.damage for table in self.latents.tables.values()]
        state += [p.sum() for site in self.latents.networks.values() for p in site.parameters]
        device = self.train.device  # which is read once
        sums = torch.stack([x.detach().to(device, torch.float32) for x in state])
        finite = bool(sums.isfinite().all())
        if not self.ranks.most(int(not finite))[0]:
            return
        now = {group: self.rate(group) for group in self.schedules}
        used = ", ".join(f"{group}={eta:.2g}" for group, eta in now.items())
        tries = ", ".join(f"{group}={eta / 4:.2g}" for group, eta in now.items())
        raise Diverged(
            f"the chain diverged: the potential is not finite at step {self.steps} with step "
            f"sizes {used}. Try smaller ones: {tries}"
        )

    def check_together(self) -> None:
        """Refuse to go on where the processes that run the chain have come apart.

        Raises:
            RanksError: with what differs between them.
        """
        state = self._tensors()
        parts = {name.removeprefix("latents/") for name, _, _ in self._shared_out()}
        state = {name: tensor for name, tensor in state.items() if name not in parts}
        apart = self.ranks.apart(state | {"generator": self.generator.get_state()})
        if apart:
            raise RanksError(
                f"the processes' states differ at step {self.steps}, in {', '.join(apart[:3])}, "
                "and must be equal to the last bit: give them equal devices and the same versions, "
                "data and settings, and networks without state of their own. resume=true "
                "continues from the last checkpoint"
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, beside the settings and the data.

        Networks that are shared out between processes are put together; all must ask.
        """
        state = {f"latents/{k}": v for k, v in self.latents.state_dict().items()}
        state |= {f"train_rows/{k}": v for k, v in self.train_rows.state_dict().items()}
        state |= {f"meta_rows/{k}": v for k, v in self.meta_rows.state_dict().items()}
        state |= {f"clipped/{k}": v.clone() for k, v in self.clipped.items()}
        state |= {f"adaptation/{k}": v for k, v in self.adaptation.state_dict().items()}
        state |= {name: tensor.clone() for name, tensor in self._state_tensors()}
        for name, shards, number in self._shared_out():
            state[name] = shards.whole(number, state[name]).cpu()
        return state | {
            "generator": self.generator.get_state(),
            "steps": torch.tensor(self.steps),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave, after `setup` with the same settings and data.

        Raises:
            InputError: if the state belongs to another program or sampler, or to a device of
                another kind.
        """
        own = self.generator.get_state().numel()
        if state["generator"].numel() != own:
            raise InputError(
                "the checkpoint was written on another kind of device, whose random numbers "
                f"{self.generator.device.type} does not have ({state['generator'].numel()} bytes "
                f"of state, expected {own}): resume on that kind, or start anew in another run_dir"
            )
        mine = {name for name in self.state_dict() if not name.startswith("latents/")}
        given = {name for name in state if not name.startswith("latents/")}
        apart = sorted(name for name in mine ^ given if "_rows/" not in name)
        if apart:
            raise InputError(
                f"the checkpoint is that of another sampler: the two differ in {apart[:3]}. Resume "
                "with the sampler of the first run, or start anew in another run_dir"
            )

        state = dict(state)
        for name, shards, number in self._shared_out():
            if name in state and state[name].shape == shards.shapes[number]:
                state[name] = shards.part(number, state[name])

        def part(prefix: str) -> dict[str, Tensor]:
            start = len(prefix) + 1
            return {k[start:]: v for k, v in state.items() if k.startswith(prefix + "/")}

        self.latents.load_state_dict(part("latents"))
        self.generator.set_state(state["generator"])
        self.train_rows.load_state_dict(part("train_rows"))
        self.meta_rows.load_state_dict(part("meta_rows"))
        for group, count in part("clipped").items():
            self.clipped[group].copy_(count)
        self.adaptation.load_state_dict(part("adaptation"))
        for name, tensor in self._state_tensors():
            tensor.copy_(state[name])
        self.steps = self.latents.steps = int(state["steps"])

    def _shared_out(self) -> Iterator[tuple[str, Shards, int]]:
        """Names in the state of what is shared out, how, and the number of the parameter."""
        for group, network in self.latents.networks.items():
            if network.shards is None:
                continue
            for number, parameter in enumerate(network.names):
                yield f"latents/network/{group}/{parameter}", network.shards, number
                if network.moves is not None:
                    yield f"latents/moves/{group}/{parameter}", network.shards, number
                for key in self.states.get(group, {}):
                    yield f"state/{group}/{key}/{number}", network.shards, number

    def _tensors(self) -> dict[str, Tensor]:
        """The live tensors of the state, by name."""
        return dict(self.latents.tensors()) | dict(self._state_tensors())

    def _state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The sampler's own state, by name."""
        for group, state in self.states.items():
            for key, tensors in state.items():
                for number, tensor in enumerate(tensors):
                    yield f"state/{group}/{key}/{number}", tensor

    def site_values(
        self, site: str = SITE, chunk: int = 2048, *, rows: Tensor | None = None
    ) -> Tensor:
        """Values (M,) of a per-point site, constrained, of the train points `rows` (M,), or of all.

        A table is read; a computed site (a weight network's "w") is evaluated in chunks, of which
        every process takes its share: of all points that costs as much as many steps.
        """
        table = self.latents.tables.get(site)
        if table is not None:
            return table.values(slice(None) if rows is None else rows)
        meta = self.meta.batch(torch.arange(1, device=self.meta.device))
        rows = torch.arange(len(self.train), device=self.train.device) if rows is None else rows
        missing = -len(rows) % self.ranks.size  # as many for each process
        padded = torch.cat([rows, rows[-1:].expand(missing)])
        found = [
            self.latents.values(site, self.train.batch(part), meta)
            for part in self.ranks.share(padded).split(chunk)
        ]
        return self.ranks.gather(torch.cat(found))[: len(rows)]

    # pyro.infer.MCMC

    @property
    def initial_params(self) -> dict[str, Tensor]:
        return self._params()

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        raise InputError("the chain starts at the modules' parameters: set those before the run")

    @property
    def transforms(self) -> dict[str, Any]:
        """Constrained-to-unconstrained bijections by site, as MCMC wants them."""
        latents = self.latents
        return {
            name: site.transform.inv for name, site in (latents.globals | latents.tables).items()
        }

    def _params(self) -> dict[str, Tensor]:
        found = {
            f"{name}.{parameter}": value
            for name, network in self.latents.networks.items()
            for parameter, value in zip(network.names, network.parameters, strict=True)
        }
        found |= {name: site.value for name, site in self.latents.globals.items()}
        found |= {name: table.value for name, table in self.latents.tables.items()}
        return {name: value.detach().clone() for name, value in found.items()}

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """`thinning` steps from the present state, which is where `params` were taken."""
        for _ in range(self.thinning):
            self.step()
        self.check_finite()
        return self._params()

    def logging(self) -> OrderedDict[str, str]:
        return OrderedDict((k, f"{v:.4g}") for k, v in self.report().items())

    def report(self) -> dict[str, float]:
        """Losses of the last minibatch per point, and the mean weight (reads from the device).

        "weighted_train_loss" is the mean of rho w l over the batch as drawn.
        """
        shown = {"meta_target": "meta_loss", "train_loss": "weighted_train_loss"}
        terms = self.latents.terms
        means = {name: terms[term].mean() for term, name in shown.items() if term in terms}
        self.ranks.mean_(list(means.values()))
        report = {name: -float(mean) for name, mean in means.items()}
        total = self.latents.total(SITE)
        return report if total is None else report | {"mean_w": float(total) / len(self.train)}

    @property
    def evidence(self) -> str:
        """What the draws so far may be called (reads from the device).

        "calibrated": p^(1/T) up to the bias of the step size. "approximate": the drift of some
        group is not the gradient of one density (companions that restart or revert, temperatures
        that differ, a clip that acted, augmented data). "optimisation path": mode "paper",
        temperature 0, or a program that changes with the steps.
        """
        cold = self.mode == "paper" or not any(self.temperatures.values())
        if cold or self.latents.changes:
            return "optimisation path"
        companions = [network.companion for network in self.latents.networks.values()]
        approximate = (
            any(
                isinstance(c, Revert) or (c is not None and c.every is not None) for c in companions
            )
            or len(set(self.temperatures.values())) > 1
            or any(data.augment is not None for data in (self.train, self.meta))
            or any(float(count) > 0 for count in self.clipped.values())
        )
        return "approximate" if approximate else "calibrated"

    def diagnostics(self) -> dict[str, Any]:
        steps = max(self.steps - self.warmup_steps, 1)
        moves = {
            group: self.local_steps if group in self.latents.tables else 1 for group in self.clipped
        }
        return {
            "steps": self.steps,
            "mode": self.mode,
            "temperature": self.temperatures,
            "clipped": {
                group: float(count) / (steps * moves[group])
                for group, count in self.clipped.items()
            },
        }
