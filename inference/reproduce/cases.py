"""Which methods run on which data: the one place that declares them.

A case is a method on a setting, with a variant of it where a figure turns a knob; its runs differ
by seed only. To add a method, add a line to `METHODS`: every figure that shows all methods has it
from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from inference.reproduce.settings import SIZES, Setting


@dataclass(frozen=True)
class Method:
    """A method as `inference.run` is asked for it.

    Attributes:
        name: in the names of folders and in claims.
        options: of `inference.run`.
        cost: of a step, in steps of plain training; for estimates of time only.
        weighs: whether it finds weights, which figures can show.
        proxy_steps: of networks that it trains ahead, unless the setting says otherwise.
        sizes: at which it is run.
        texts: whether it is for tasks of texts only.
    """

    name: str
    options: tuple[str, ...]
    cost: float = 1.0
    weighs: bool = False
    proxy_steps: int = 0
    sizes: tuple[str, ...] = tuple(SIZES)
    texts: bool = False


PRESET = "preset=paper"

METHODS = {
    method.name: method
    for method in (
        Method("bads", ("method=bads",), 1.3, True),
        # The paper's model, with weights that part as far as docs/results.md found useful.
        Method("bads_joint", ("method=bads", "model=joint", "impact.weight=20"), 1.2, True),
        # All of the paper's own settings, which need its number of steps.
        Method("bads_paper", ("method=bads", PRESET), 1.2, True, sizes=("paper",)),
        Method("blo", ("method=blo",), 3.0, True),
        Method("mixing", ("method=mixing",)),
        Method("meta_only", ("method=meta_only",), 0.8),
        Method("random_select", ("method=random_select",)),
        Method("dup_meta", ("method=dup_meta",)),
        Method("cds", ("method=cds",), 1.2, True, proxy_steps=1500),
        Method("rho_loss", ("method=rho_loss",), 2.4, True, proxy_steps=1500),
        Method("classact", ("method=classact",), 1.6, True, proxy_steps=1500),
        Method("rds", ("method=rds",), proxy_steps=1500),
        # It takes a language model that can answer, and an accelerator for that.
        Method("askllm", ("method=askllm",), 1.1, True, sizes=("paper",), texts=True),
    )
}


@dataclass(frozen=True, eq=False)
class Variant:
    """A knob turned.

    Attributes:
        name: in the names of folders and in claims, "sigma0.5" say.
        label: on figures, knob to value.
        options: of `inference.run`, given the setting and the size.
    """

    name: str
    label: Mapping[str, str]
    options: Callable[[Setting, str], tuple[str, ...]]


def sigma(value: float) -> Variant:
    """Sigma of (8) where losses and the total weight are means, as the paper's step sizes suggest.

    With U / N_t in place of U, (mean w - beta)^2 / (2 sigma^2) is (8) with sigma sqrt(N_t) points.
    """

    def options(setting: Setting, size: str) -> tuple[str, ...]:
        return (f"prior.sparsity_scale={value * math.sqrt(setting.points[size]):.3g}",)

    return Variant(f"sigma{value:g}", {"sigma": f"{value:g}"}, options)


def strict(points: float) -> Variant:
    """Sigma of (8), in points, about as small as our step of the weights can take."""
    options = (f"prior.sparsity_scale={points:g}",)
    return Variant("strict", {"sigma": "strict"}, lambda setting, size: options)


def beta(value: float) -> Variant:
    """The share of the train set to select."""
    name, shown = f"beta{value:g}", {"beta": f"{value:g}"}
    return Variant(name, shown, lambda setting, size: (f"sparsity={value:g}",))


def network() -> Variant:
    """Weights from a linear layer on the embedding, not one per point."""
    return Variant("network", {}, lambda setting, size: ("weights=network",))


AS_IT_IS = Variant("", {}, lambda setting, size: ())


class Key(NamedTuple):
    """The names of a case."""

    setting: str
    method: str
    variant: str = ""


@dataclass(frozen=True, eq=False)
class Case:
    """A method on a setting; its runs differ by seed only."""

    setting: Setting
    method: Method
    variant: Variant = AS_IT_IS

    @property
    def key(self) -> Key:
        return Key(self.setting.name, self.method.name, self.variant.name)

    @property
    def folder(self) -> str:
        """Of its runs, below the folder of all runs."""
        name = "-".join(part for part in (self.method.name, self.variant.name) if part)
        return f"{self.setting.name}/{name}"

    def proxy_steps(self, size: str) -> int:
        """Steps of networks that are trained ahead."""
        own = self.method.proxy_steps
        return self.setting.proxy_steps.get(size, own) if own else 0

    def options(self, size: str) -> tuple[str, ...]:
        """Of `inference.run`, without the seed."""
        setting = self.setting
        preset = setting.preset if PRESET in self.method.options else ()
        changed = self.method.proxy_steps and size in setting.proxy_steps
        return (
            *setting.options[size],
            f"steps={setting.steps[size]}",
            *self.method.options,
            *setting.by_method.get(self.method.name, ()),
            *preset,
            *((f"method.proxy.steps={self.proxy_steps(size)}",) if changed else ()),
            *self.variant.options(setting, size),
        )

    def seconds(self, size: str) -> float:
        """About how long a run takes on one core ("paper": on an accelerator)."""
        setting = self.setting
        steps = setting.steps[size] * self.method.cost + self.proxy_steps(size)
        return setting.start_s[size] + steps * setting.step_ms[size] / 1000


def every_method(
    *settings: Setting, weighs: bool = False, without: Collection[str] = ()
) -> tuple[Case, ...]:
    """All methods on these settings, or those that find weights, without some by name."""
    return tuple(
        Case(setting, method)
        for setting in settings
        for method in METHODS.values()
        if (method.weighs or not weighs)
        and (setting.texts or not method.texts)
        and method.name not in without
    )
