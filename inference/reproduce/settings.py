"""The data, networks and lengths of chains that figures and tables are about, at each size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from inference.cifar import load_cifar10
from inference.instruction_sets import find_instructions
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
class Score:
    """What test points are scored by.

    Attributes:
        name: in results, "accuracy" say.
        title: on figures and in tables.
        scale: by which sentences and tables show it.
        unit: after it, likewise.
        difference: the unit of a difference.
        kept: whether it is that of the network that a run keeps; else of the last iterate.
    """

    name: str
    title: str
    scale: float
    unit: str
    difference: str
    kept: bool = False

    @property
    def final(self) -> str:
        """The entry of the results for the paper's final model."""
        return f"test.{self.name}" if self.kept else f"test.{self.name}_last"

    def value(self, score: float) -> str:
        """A score as sentences show it."""
        return f"{self.scale * score:.1f}{self.unit}"

    def points(self, difference: float) -> str:
        """A difference of two scores, likewise."""
        return f"{self.scale * difference:+.1f}".replace("-", "−")


ACCURACY = Score("accuracy", "test accuracy", 100.0, " %", "percentage points")
BLEU = Score("bleu", "test BLEU", 1.0, "", "points of BLEU")
NEXT_TOKEN = Score(
    "accuracy", "next tokens of answers", 100.0, " %", "percentage points", kept=True
)
BENCHMARK = Score("benchmark", "right answers", 100.0, " %", "percentage points", kept=True)


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
        score: of the test points, by which claims are judged.
        also: further scores to show.
        texts: whether points are texts.
        proxy_steps: of networks that methods train ahead, by size, where not the method's own.
        files_only: no one downloads the real data: they are the user's files.
        by_method: options that a method needs here, by its name.
        for_cost: options for measuring the cost of a step, in place of what is only done before.
        model: the option by which another language model than the paper's can be taken, if any.
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
    also: tuple[Score, ...] = ()
    texts: bool = False
    proxy_steps: Mapping[str, int] = field(default_factory=lambda: {"trial": 10})
    files_only: bool = False
    by_method: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    for_cost: tuple[str, ...] = ()
    model: str | None = None

    @property
    def data(self) -> str:
        """The title's first part."""
        return self.title.partition(",")[0]


SOURCES = ("flan_cot", "dolly", "oasst1")
"""Of instructions."""

TITLES = {
    "mmlu": "MMLU",
    "arc_easy": "ARC-easy",
    "arc_challenge": "ARC-challenge",
    "hellaswag": "HellaSwag",
}

OPEN_LLAMA = "openlm-research/open_llama_3b_v2"
"""Fine-tuned at size=paper. Weights that are pickles are refused: save the model as safetensors and
name its folder with `language_model=`."""


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
    # The prior on the total weight is steep in phi without `normalised`, most so with many points.
    gentle = {
        "full": {"blo": ("weights.step_size=5e-6",)},
        "controlled": {"bads_joint": ("weights.step_size=1e-4",)},
    }[kind]
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
        texts=True,
        proxy_steps={"trial": 10, "small": 400},
        files_only=True,
        by_method=gentle,
        for_cost=("task.data.pretraining=0",),
    )


def llm(target: str) -> Setting:
    """Instruction tuning for a benchmark, on the paper's sources."""
    sources = ", ".join(f"{name}: {name}" for name in SOURCES)
    task = (
        "task=llm",
        f"task.target={target}",
        f"task.data.sources={{{sources}}}",
        "task.data.empty=drop",
        "chains=1",
    )
    steps = {"trial": 4, "small": 200, "paper": 3000}
    points = {"trial": 60, "small": 1500, "paper": 50_000}
    built = (*task, "task.model=built", "task.data.max_tokens=128")
    few = ("task.data.pretraining=2", "task.data.tested=20", "thinning=1", "evaluate_every=2")
    large = (f"task.model={OPEN_LLAMA}", "backbone.tune=lora", "backbone.precision=bfloat16")
    return Setting(
        f"llm-{target}",
        TITLES[target],
        (f"instructions for {target}",),
        partial(find_instructions, sources=SOURCES, target=target),
        options={
            "trial": (*built, *few, "task.data.per_source=20", "task.data.questions=8"),
            "small": (
                *built,
                f"task.data.per_source={points['small'] // len(SOURCES)}",
                "task.data.questions=400",
                "evaluate_every=40",
            ),
            "paper": (*task, *large, "task.data.questions=null", "evaluate_every=200"),
        },
        steps=steps,
        points=points,
        step_ms={"trial": 200, "small": 500, "paper": 500},
        start_s={"trial": 30, "small": 40, "paper": 600},
        stand_in=(
            "data.source=generated",
            "task.target=null",
            "task.data.sources=null",
            "task.data.questions=0",
        ),
        preset=("sparsity=0.05", "method.learning_rate=3e-5"),
        score=BENCHMARK,
        also=(NEXT_TOKEN,),
        texts=True,
        proxy_steps={"trial": 4, "small": 200},
        files_only=True,
        for_cost=("task.data.pretraining=0", "task.data.questions=0"),
        model="task.model",
    )
