"""Stochastic gradient Langevin dynamics, (6) and (7), as a Pyro kernel.

    x <- x - eta / 2 * grad U(x) + sqrt(eta T) xi,    xi ~ Normal(0, 1)

U is minus the log joint, a sum over the data; its gradient comes from a minibatch of each plate
(Welling and Teh, 2011). Local latents of a subsampled plate move when their row is in the batch:
each visited row takes a step of its own exact conditional, so a step costs O(B).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from bads_ppl.data import Data
from bads_ppl.errors import Diverged, InputError
from bads_ppl.latents import Latents
from bads_ppl.minibatches import ImportanceMinibatches, UniformMinibatches, check_batch_size
from bads_ppl.primitives import Revert
from bads_ppl.program import Program
from bads_ppl.schedules import Schedule, by_group
from bads_ppl.weights import SITE

PAPER_NOISE = 1e-5
"""Standard deviation of the noise in mode "paper", whatever the step size."""


class SGLD(MCMCKernel):
    """Samples all latent sites of a program from minibatches.

    Runs in `pyro.infer.MCMC(SGLD(...), ...).run(train, meta)` and in `bads_ppl.chains`.
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
        clip: longest drift eta / 2 |grad U| of a step, for all groups or per group: of the whole
            group for networks, of each row for local sites. It keeps a chain from jumps; since
            the drift shrinks with eta and the bound does not, its bias vanishes with the step
            (Brosse et al., 2019). `diagnostics` gives the share of steps after warm-up in which it
            acted.
        train_batch: rows of the train set per step; None: min(100, N_t).
        meta_batch: rows of the meta set per step; None: min(50, N_m).
        minibatches: "uniform", or "importance": half of the train rows are drawn in proportion to
            w, with the unbiased correction.
        thinning: steps per draw when run by `pyro.infer.MCMC`.
        generator: source of data order and noise, on the device of the data.

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
        thinning: int = 1,
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
        self.thinning = thinning
        self.generator = generator
        self.steps = 0

    # state

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Find the program's sites and start the minibatches; args are the train and meta `Data`.

        Raises:
            InputError: if the arguments are not two `Data`, a batch is larger than its set, or a
                group has no step size.
        """
        if len(args) != 2 or kwargs or not all(isinstance(a, Data) for a in args):
            raise InputError(
                "SGLD draws its own minibatches: run it with the train and meta sets, as in "
                "MCMC(kernel, ...).run(Data(...), Data(...))"
            )
        if torch.multiprocessing.parent_process() is not None:
            # MCMC starts each chain as a copy of this kernel: without this all would be the same.
            self.generator.manual_seed(torch.initial_seed())
        self.warmup_steps = warmup_steps
        self.train, self.meta = args
        train_batch = min(100, len(self.train)) if self.train_batch is None else self.train_batch
        meta_batch = min(50, len(self.meta)) if self.meta_batch is None else self.meta_batch
        check_batch_size(train_batch, len(self.train), "train")
        check_batch_size(meta_batch, len(self.meta), "meta")
        rows = [torch.arange(n, device=self.train.device) for n in (train_batch, meta_batch)]
        self.latents = Latents.find(
            self.program, self.train.batch(rows[0]), self.meta.batch(rows[1])
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
        self.meta_rows = UniformMinibatches(len(self.meta), meta_batch, self.generator)
        self.train_rows: UniformMinibatches | ImportanceMinibatches
        if self.minibatches == "uniform":
            self.train_rows = UniformMinibatches(len(self.train), train_batch, self.generator)
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
        self.potential = torch.tensor(math.nan)

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
        """One step of all groups. No value is read back to the host."""
        rows = self.train_rows.next()
        train = self.train.batch(rows.index, rows.importance)
        meta = self.meta.batch(self.meta_rows.next().index)
        latents = self.latents
        self.potential = latents.backward(train, meta)
        with torch.no_grad():
            shortened = {
                name: self._move(name, network.parameters, network.gradients())
                for name, network in latents.networks.items()
                if network.moves is None
            }
            for network in latents.networks.values():
                if isinstance(network.companion, Revert) and network.moves is not None:
                    other = network.companion.network
                    torch._foreach_mul_(network.moves, 1 - 1 / network.companion.window)
                    torch._foreach_mul_(network.part, shortened[other])
                    eta = self.schedules[other](self.steps)
                    torch._foreach_add_(network.moves, network.part, alpha=0.5 * eta)
            for name, site in latents.globals.items():
                assert site.value.grad is not None
                self._move(name, [site.value], [site.value.grad])
            for name, table in latents.tables.items():
                assert table.rows is not None and table.rows.grad is not None
                assert table.index is not None
                # The plate scaled the row's own terms to the whole set; the row is one point.
                grad = table.rows.grad * (len(table.index) / len(table.value))
                new = table.rows.detach()
                ours = table.index is train.index  # else a local latent of the meta plate
                self._move(name, [new], [grad], train.importance if ours else None)
                latents.move_rows(name, new, distinct=rows.distinct or not ours)
        self.steps += 1
        latents.finish_step(self.steps, distinct=rows.distinct)

    def _move(
        self, group: str, values: list[Tensor], grads: list[Tensor], speed: Tensor | None = None
    ) -> Tensor | float:
        """Langevin step of one group, in place; `speed` (B,) multiplies eta row by row.

        Gradients of rows carry that factor already (it is the rows' importance correction).
        Returns the factor by which a clip shortened the drift of a network, at most 1.
        """
        eta = self.schedules[group](self.steps)
        bound = self.clips[group]
        shortened: Tensor | float = 1.0
        if bound is not None:
            shortened = self._clip(
                group, grads, 2 * bound / eta, by_row=group in self.latents.tables
            )
        torch._foreach_add_(values, grads, alpha=-0.5 * eta)
        calibrated = math.sqrt(eta * self.temperatures[group])
        scale = PAPER_NOISE if self.mode == "paper" else calibrated
        if scale == 0:
            return shortened
        count = sum(value.numel() for value in values)
        flat = torch.randn(count, generator=self.generator, device=values[0].device)
        noise = [
            part.view_as(value)
            for part, value in zip(flat.split([v.numel() for v in values]), values, strict=True)
        ]
        if speed is not None and self.mode == "calibrated":
            root = speed.sqrt()
            noise = [part * root.view(-1, *[1] * (part.ndim - 1)) for part in noise]
        torch._foreach_add_(values, noise, alpha=scale)
        return shortened

    def _clip(
        self, group: str, grads: list[Tensor], bound: float, *, by_row: bool
    ) -> Tensor | float:
        """Bound the gradients in place; see `_move`. Counts how often, after warm-up."""
        shortened: Tensor | float = 1.0
        if by_row:
            (grad,) = grads
            acted = (grad.abs() > bound).to(grad.dtype).mean()
            grad.clamp_(-bound, bound)
        else:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            acted = norm > bound
            shortened = (bound / (norm + 1e-12)).clamp(max=1.0)
            torch._foreach_mul_(grads, shortened)
        if self.steps >= self.warmup_steps:
            self.clipped[group] += acted
        return shortened

    # what the outside sees

    def check_finite(self) -> None:
        """Refuse to go on from a non-finite state (reads from the device).

        Raises:
            Diverged: with the step sizes in use and those to try.
        """
        state = [self.potential] + [table.value.sum() for table in self.latents.tables.values()]
        state += [p.sum() for site in self.latents.networks.values() for p in site.parameters]
        if bool(torch.stack([x.detach().double().cpu() for x in state]).isfinite().all()):
            return
        now = {group: schedule(self.steps) for group, schedule in self.schedules.items()}
        used = ", ".join(f"{group}={eta:.2g}" for group, eta in now.items())
        tries = ", ".join(f"{group}={eta / 4:.2g}" for group, eta in now.items())
        raise Diverged(
            f"the chain diverged: the potential is not finite at step {self.steps} with step "
            f"sizes {used}. Try smaller ones: {tries}"
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, beside the settings and the data."""
        state = {f"latents/{k}": v for k, v in self.latents.state_dict().items()}
        state |= {f"train_rows/{k}": v for k, v in self.train_rows.state_dict().items()}
        state |= {f"meta_rows/{k}": v for k, v in self.meta_rows.state_dict().items()}
        state |= {f"clipped/{k}": v for k, v in self.clipped.items()}
        return state | {
            "generator": self.generator.get_state(),
            "steps": torch.tensor(self.steps),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave, after `setup` with the same settings and data.

        Raises:
            InputError: if the state belongs to another program.
        """

        def part(prefix: str) -> dict[str, Tensor]:
            start = len(prefix) + 1
            return {k[start:]: v for k, v in state.items() if k.startswith(prefix + "/")}

        self.latents.load_state_dict(part("latents"))
        self.generator.set_state(state["generator"])
        self.train_rows.load_state_dict(part("train_rows"))
        self.meta_rows.load_state_dict(part("meta_rows"))
        for group, count in part("clipped").items():
            self.clipped[group].copy_(count)
        self.steps = int(state["steps"])

    def site_values(self, site: str = SITE, chunk: int = 2048) -> Tensor:
        """Values (N_t,) of a per-point site for all train points, constrained.

        A table is read; a computed site (a weight network's "w") is evaluated in chunks.
        """
        table = self.latents.tables.get(site)
        if table is not None:
            return table.values()
        meta = self.meta.batch(torch.arange(1, device=self.meta.device))
        return torch.cat(
            [self.latents.values(site, batch, meta) for batch in self.train.batches(chunk)]
        )

    # pyro.infer.MCMC

    @property
    def initial_params(self) -> dict[str, Tensor]:
        return self._params()

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        raise InputError("SGLD starts at the modules' parameters: set those before the run")

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
        report: dict[str, float] = {}
        terms = self.latents.terms
        if "meta_target" in terms:
            report["meta_loss"] = -float(terms["meta_target"].mean())
        if "train_loss" in terms:
            report["weighted_train_loss"] = -float(terms["train_loss"].mean())
        table = self.latents.tables.get(SITE)
        if table is not None:
            report["mean_w"] = float(table.values().mean())
        else:
            for plate_sum in self.latents.sums.values():
                report["mean_w"] = float(plate_sum.total) / len(self.train)
        return report

    @property
    def evidence(self) -> str:
        """What the draws so far may be called (reads from the device).

        "calibrated": p^(1/T) up to the bias of the step size. "approximate": the drift of some
        group is not the gradient of one density (companions that restart or revert, temperatures
        that differ, a clip that acted). "optimisation path": mode "paper".
        """
        if self.mode == "paper":
            return "optimisation path"
        networks = self.latents.networks.values()
        companions = [network.companion for network in networks]
        approximate = (
            any(
                isinstance(c, Revert) or (c is not None and c.every is not None) for c in companions
            )
            or len(set(self.temperatures.values())) > 1
            or any(float(count) > 0 for count in self.clipped.values())
        )
        return "approximate" if approximate else "calibrated"

    def diagnostics(self) -> dict[str, Any]:
        steps = max(self.steps - self.warmup_steps, 1)
        return {
            "steps": self.steps,
            "mode": self.mode,
            "temperature": self.temperatures,
            "clipped": {group: float(count) / steps for group, count in self.clipped.items()},
        }
