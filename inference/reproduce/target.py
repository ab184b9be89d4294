"""What a figure or a table is, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from inference.reproduce import figures
from inference.reproduce.cases import AS_IT_IS, METHODS, Case, Key, Variant, every_method
from inference.reproduce.claims import Claim, Predicate, ahead, flat, inverted, right_way
from inference.reproduce.jobs import CostJob, Job, Place, RunJob
from inference.reproduce.results import Results
from inference.reproduce.settings import Setting


@dataclass(frozen=True)
class Target:
    """A figure or a table.

    Attributes:
        name: as on the command line.
        title: what it shows.
        cases: what is run, one run per seed.
        draw: the figure.
        claims: what the paper says of it.
        differs: in what our set-up is not the paper's, beside what holds for all targets.
        measures_cost: the cases are not run but timed side by side.
        caption: what the figure's marks are.
    """

    name: str
    title: str
    cases: Sequence[Case]
    draw: Callable[[Results], Figure]
    claims: Sequence[Claim]
    differs: Sequence[str] = ()
    measures_cost: bool = False
    caption: str = "Line: mean over seeds; band: lowest to highest seed."

    def jobs(self, place: Place, seeds: Sequence[int], methods: Sequence[str]) -> list[Job]:
        """What there is to run, seed by seed, so that all methods have the first seed first."""
        cases = [
            case
            for case in self.cases
            if place.size in case.method.sizes and case.method.name in methods
        ]
        if not self.measures_cost:
            return [RunJob(case, seed, place) for seed in seeds for case in cases]
        settings = {case.setting.name: case.setting for case in cases}
        return [
            CostJob(setting, [case for case in cases if case.setting is setting], place)
            for setting in settings.values()
        ]


def order(name: str) -> tuple[str, int, str]:
    """By which targets are listed: fig2 before fig2_webnlg, and that before fig13."""
    figure, _, data = name.partition("_")
    letters = figure.rstrip("0123456789")
    return letters, int(figure[len(letters) :] or 0), data


PLAIN = ("mixing", "meta_only", "random_select", "dup_meta")
REST = (*PLAIN, "blo", "cds", "classact")
"""What the paper compares BADS with on images."""


def on(setting: str, *methods: str) -> list[Key]:
    """These methods on a setting."""
    return [Key(setting, method) for method in methods]


UNPAPERED = ("rho_loss", "rds")
"""Methods that the paper lacks, left out where they would take long."""


def first(setting: str) -> Claim:
    """BADS is ahead of everything else."""
    bads, *rest = on(setting, "bads", *REST)
    return Claim("BADS ends ahead of every other method.", ahead(bads, rest))


PROGRAMS = {
    "bads": "with our default program",
    "bads_joint": "with the paper's model (model=joint)",
}


def of_both_programs(
    sentence: str,
    setting: Setting,
    variant: str,
    predicate: Callable[[Key], Predicate],
    note: str = "",
) -> list[Claim]:
    """A sentence on BADS, as a claim on our default program and one on the paper's model."""
    return [
        Claim(f"{sentence}, {how}.", predicate(Key(setting.name, method, variant)), note)
        for method, how in PROGRAMS.items()
    ]


def turned(settings: Sequence[Setting], variants: Sequence[Variant]) -> list[Case]:
    """Both programs, as they are and with a knob turned."""
    return [
        Case(setting, METHODS[method], variant)
        for setting in settings
        for method in PROGRAMS
        for variant in (AS_IT_IS, *variants)
    ]


def weights_by_group(name: str, setting: Setting, high: str, low: str) -> Target:
    """Mean weights by group over steps, of all methods that find weights."""
    return Target(
        name,
        f"Mean weights by group over steps: {setting.title}",
        every_method(setting, weighs=True),
        figures.weights,
        of_both_programs(f"BADS weighs {high} more than {low}", setting, "", right_way),
    )


BETAS: list[tuple[float, str, Callable[[Key], Predicate]]] = [
    (0.05, "is right", right_way),
    (0.2, "flattens the weights", flat),
    (0.8, "inverts the weights", inverted),
]
"""What the paper says of beta on WebNLG."""
