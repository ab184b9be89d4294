"""Which methods run on which data, at which size: the one place that declares them.

A case is a method on a setting, with a variant of it where a figure turns a knob; its runs differ
by seed only. To add a method, add a line to `METHODS`: every figure that shows all methods has it
from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from inference.cifar import load_cifar10
from inference.sources import load_mnist
from inference.webnlg_entries import find_webnlg
from models.pretrained import T5_SMALL


@dataclass(frozen=True)
class Size:
    """How much is run.

    Attributes:
        name: as on the command line.
        seeds: those that are run unless the user says otherwise.
        about: what it is for.
    """

    name: str
    seeds: tuple[int, ...]
    about: str


SIZES = {
    size.name: size
    for size in (
        Size("trial", (0,), "a few steps, to see that everything works; its numbers say nothing"),
        Size("small", (0, 1, 2), "on two cores within an hour a target; the default"),
        Size("paper", (0, 1, 2, 3, 4), "the paper's steps, data and networks; for an accelerator"),
    )
}


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
    """

    name: str
    options: tuple[str, ...]
    cost: float = 1.0
    weighs: bool = False
    proxy_steps: int = 0
    sizes: tuple[str, ...] = tuple(SIZES)


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
    )
}


@dataclass(frozen=True)
class Score:
    """What test points are scored by.

    Attributes:
        name: in results, "accuracy" say.
        title: on figures and in tables.
        scale: by which sentences and tables show it.
        unit: after it, likewise.
        difference: the unit of a difference.
    """

    name: str
    title: str
    scale: float
    unit: str
    difference: str

    @property
    def last(self) -> str:
        """The entry of the results for the last iterate, which is the paper's final model."""
        return f"test.{self.name}_last"

    def value(self, score: float) -> str:
        """A score as sentences show it."""
        return f"{self.scale * score:.1f}{self.unit}"

    def points(self, difference: float) -> str:
        """A difference of two scores, likewise."""
        return f"{self.scale * difference:+.1f}".replace("-", "−")


ACCURACY = Score("accuracy", "test accuracy", 100.0, " %", "percentage points")
BLEU = Score("bleu", "test BLEU", 1.0, "", "points of BLEU")


@dataclass(frozen=True, eq=False)
class Setting:
    """Data, network and length of the chains, by size.

    Attributes:
        name: in the names of folders and in claims.
        title: on figures.
        datasets: the names that results record for the real data.
        find: finds, or downloads, the real data in a folder, given `data.source`.
        options: of `inference.run`, by size; the number of steps apart.
        steps: by size.
        points: N_t by size.
        step_ms: of plain training on one core (for "paper": on an accelerator), by size.
        start_s: a run's seconds beside its steps (imports, data, evaluations), by size.
        stand_in: options that take small data which need no files in place of the real ones.
        preset: what preset=paper needs beside it on these data.
        paper_data: sizes at which data and network are the paper's, so that levels compare.
        score: of the test points.
        proxy_steps: of networks that methods train ahead, by size, where not the method's own.
        files_only: no one downloads the real data: they are the user's files.
        for_cost: options for measuring the cost of a step, in place of what is only done before.
    """

    name: str
    title: str
    datasets: tuple[str, ...]
    find: Callable[[Path, str], object]
    options: Mapping[str, tuple[str, ...]]
    steps: Mapping[str, int]
    points: Mapping[str, int]
    step_ms: Mapping[str, float]
    start_s: Mapping[str, float]
    stand_in: tuple[str, ...]
    preset: tuple[str, ...] = ()
    paper_data: tuple[str, ...] = ("paper",)
    score: Score = ACCURACY
    proxy_steps: Mapping[str, int] = field(default_factory=lambda: {"trial": 10})
    files_only: bool = False
    for_cost: tuple[str, ...] = ()

    @property
    def data(self) -> str:
        """The title's first part."""
        return self.title.partition(",")[0]


def mnist(meta_per_class: int = 25) -> Setting:
    """Data balancing: 4,975 nines and 25 fours."""
    task = ("task=mnist", f"task.meta_per_class={meta_per_class}", "chains=1")
    return Setting(
        f"mnist-{meta_per_class}",
        f"MNIST, 4 against 9, {meta_per_class} + {meta_per_class} meta",
        ("mnist",),
        load_mnist,
        options={
            "trial": (*task, "thinning=2", "evaluate_every=4"),
            "small": (*task, "evaluate_every=100"),
            "paper": (*task, "evaluate_every=500", "thinning=50"),
        },
        steps={"trial": 12, "small": 1500, "paper": 15_000},
        points=dict.fromkeys(SIZES, 5000),
        step_ms={"trial": 14, "small": 12, "paper": 5},
        start_s={"trial": 8, "small": 9, "paper": 30},
        stand_in=("data.source=digits",),
        paper_data=("small", "paper"),
    )


def cifar10(noise: float = 0.5, *, longer: bool = False) -> Setting:
    """Data denoising: a share `noise` of the train labels is wrong."""
    knobs = (f"task.noise={noise:g}", "chains=1")
    steps = {"trial": 5, "small": 4000, "paper": 20_000}
    if longer:
        steps = {"trial": 10, "small": 20_000, "paper": 200_000}
    options = {
        size: (
            "task=cifar10_paper" if size == "paper" else "task=cifar10",
            *knobs,
            f"evaluate_every={max(1, count // 25)}",
            f"thinning={max(1, count // 400)}",
        )
        for size, count in steps.items()
    }
    return Setting(
        f"cifar10-{noise:g}" + ("-long" if longer else ""),
        f"CIFAR-10, {100 * noise:g} % wrong labels",
        ("cifar10",),
        load_cifar10,
        options,
        steps,
        points={"trial": 10_000, "small": 10_000, "paper": 40_000},
        step_ms={"trial": 28, "small": 28, "paper": 30},
        start_s={"trial": 14, "small": 15, "paper": 60},
        stand_in=("data.source=shapes",),
        # The paper's beta, and its step sizes on mean losses: here 2 eta / points.
        preset=("sparsity=0.8", "method.learning_rate=1e-4", "weights.step_size=4.8e-9"),
    )


def webnlg(kind: str) -> Setting:
    """Efficient learning: "full", or "controlled" with a close and a far domain."""
    meta = {"full": 30, "controlled": 50}[kind]
    task = ("task=webnlg", f"task.kind={kind}", f"task.meta_per_domain={meta}", "chains=1")
    steps = {"trial": 6, "small": 600, "paper": 40_000}
    small = (*task, "task.model=built")
    draws = {"full": ("thinning=100",), "controlled": ()}[kind]  # a draw looks at all points
    return Setting(
        f"webnlg-{kind}",
        "WebNLG, "
        + {"full": "seen for unseen domains", "controlled": "a close and a far domain"}[kind],
        ("webnlg 2017", "webnlg 2020"),
        find_webnlg,
        options={
            "trial": (*small, "task.data.pretraining=2", "thinning=1", "evaluate_every=3"),
            "small": (*small, "evaluate_every=50", *draws),
            "paper": (*task, f"task.model={T5_SMALL}", "evaluate_every=2000", "thinning=100"),
        },
        steps=steps,
        points=dict.fromkeys(SIZES, {"full": 18_094, "controlled": 2139}[kind]),
        step_ms={"trial": 200, "small": 180, "paper": 60},
        start_s={"trial": 20, "small": 110, "paper": 300},
        stand_in=("data.source=generated",),
        preset=("sparsity=0.05", "method.learning_rate=3e-5"),
        score=BLEU,
        proxy_steps={"trial": 10, "small": 400},
        files_only=True,
        for_cost=("task.data.pretraining=0",),
    )


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
        if (method.weighs or not weighs) and method.name not in without
    )
