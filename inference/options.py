"""Types of the options, so that a mistyped or unknown one is refused before anything runs.

Options that every run has are typed by `Schema`. The others belong to a callable that a group names
as its `_target_`; there its signature says which options it takes, and `build` holds them to it.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, MissingMandatoryValue

from bads_ppl.errors import InputError


def names(given: Sequence[str]) -> list[str]:
    """Names that stand in a list; a single one needs none."""
    return [given] if isinstance(given, str) else list(given)


@dataclass
class DataOptions:
    """Where data come from; the files are for tasks that take a user's own."""

    root: str = "data"
    source: str = "auto"
    train: str | None = None
    meta: str | None = None
    test: str | None = None
    text: str = "text"
    label: str = "label"


@dataclass
class PriorOptions:
    """Prior (8) on the total weight."""

    sparsity_scale: float | None = None
    total: str = "exact"


@dataclass
class ImpactOptions:
    """Impact constants (24), (25)."""

    train: float = 1.0
    meta: float = 1.0
    weight: float = 1.0


@dataclass
class ProxyOptions:
    """How a proxy network is trained, where a method has one; also `inference.fitting`."""

    steps: int = 1500
    learning_rate: float = 0.1
    temperature: float = 0.0
    prior_scale: float | None = None
    clip: float | None = 0.3
    train_batch: int = 100
    meta_batch: int = 50
    backbone: Any = None
    preconditioned: bool | None = None
    schedule: str | None = None
    bucket: int | None = None


@dataclass
class MethodOptions:
    """How theta moves, and what a method's own knobs are."""

    learning_rate: float = 0.1
    temperature: float | None = None
    prior_scale: float | None = None
    clip: float | None = None
    model: Any = None
    rule: Any = None
    scores: str | None = None
    proxy: ProxyOptions | None = None


@dataclass
class WeightOptions:
    """How the weights move, and what they are."""

    group: str = "w"
    step_size: float = 0.1
    schedule: str | None = None
    temperature: float = 1.0
    clip: float | None = None
    minibatches: str = "uniform"
    build: Any = None


@dataclass
class Schema:
    """The options of a run; the values that are used stand in `configs/`."""

    seed: int = 0
    split: str = "test"
    fold: str | None = None
    steps: int = 1
    chains: int = 1
    sparsity: float | None = None
    burn_in: int | None = None
    thinning: int = 1
    snapshots: int = 5
    evaluate_every: int | None = None
    checkpoint_seconds: float = 60.0
    cache: str = "runs/cache"
    schedule: str = "constant"
    step_sizes: dict[str, float] = field(default_factory=dict)
    workers: int | None = None
    table: str = "memory"
    cuda_graph: bool | None = None
    parallel: str = "data"
    device: str = "auto"
    run_dir: str | None = None
    resume: bool = False
    overwrite: bool = False
    data: DataOptions = field(default_factory=DataOptions)
    prior: PriorOptions = field(default_factory=PriorOptions)
    impact: ImpactOptions = field(default_factory=ImpactOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    weights: WeightOptions = field(default_factory=WeightOptions)
    task: Any = None
    model: Any = None
    sampler: Any = None
    backbone: Any = None


TYPED: dict[str, type[Any]] = {
    "data": DataOptions,
    "prior": PriorOptions,
    "impact": ImpactOptions,
    "method": MethodOptions,
    "weights": WeightOptions,
}


def check_options(config: DictConfig) -> None:
    """Refuse options that no part of a run reads, which Hydra adds where a name begins with +.

    Raises:
        InputError: naming the option and what comes closest.
    """
    groups: list[tuple[DictConfig, type[Any], str]] = [(config, Schema, "")]
    groups += [(config[name], kind, f"{name}.") for name, kind in TYPED.items()]
    if config.method.proxy is not None:
        groups.append((config.method.proxy, ProxyOptions, "method.proxy."))
    for node, kind, prefix in groups:
        known = [one.name for one in fields(kind)]
        for name in map(str, node):
            if name not in known:
                raise InputError(unknown_option(f"{prefix}{name}", name, known))


def unknown_option(option: str, name: str, known: list[str]) -> str:
    """What to say of an option whose last part, `name`, is none of those `known`."""
    close = difflib.get_close_matches(name, known, 1)
    remedy = (
        f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(known)) or 'none'}"
    )
    return f"there is no option {option}: {remedy}"


def build(node: DictConfig, name: str, **given: Any) -> Any:
    """Call what a group's `_target_` names with the group's options; `_partial_` leaves it bound.

    Args:
        node: the group.
        name: its name, for messages.
        given: further arguments, which are no options.

    Raises:
        InputError: if the target cannot be found, or an option is unknown or of another type.
    """
    try:
        bound: partial[Any] = instantiate(node, _partial_=True, **given)
    except (InstantiationException, MissingMandatoryValue) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise InputError(
            f"{name}._target_ must be the full name of a callable that Python finds, such as "
            f"my_module.my_{name} with my_module.py on PYTHONPATH. {cause}"
        ) from error
    check_arguments(bound, name)
    return bound if node.get("_partial_") else bound()


def taken(node: DictConfig, offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered arguments that what a group's `_target_` names has parameters for."""
    try:
        parameters = inspect.signature(get_method(node._target_)).parameters
    except (InstantiationException, ValueError, ImportError, MissingMandatoryValue):
        return {}  # `build` says what is wrong with it
    return {name: value for name, value in offered.items() if name in parameters}


def check_arguments(bound: partial[Any], name: str) -> None:
    """Refuse keywords that the callable's signature lacks, or whose values are of another type.

    Raises:
        InputError: naming the option.
    """
    target = bound.func
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    takes_all = False
    for one in _called(target):
        try:
            found = inspect.signature(one).parameters
        except ValueError:  # some callables written in C have none
            return
        with suppress(NameError, TypeError):  # only a type checker can resolve them, or none
            hints = get_type_hints(one) | hints
        parameters = {**found, **parameters}
        takes_all = any(p.kind is p.VAR_KEYWORD for p in found.values())
        if not takes_all:
            break
    for key, value in bound.keywords.items():
        if key not in parameters and not takes_all:
            known = [p.name for p in parameters.values() if p.default is not p.empty]
            raise InputError(unknown_option(f"{name}.{key}", key, known))
        hint = hints.get(key, Any)
        if not fits(value, hint):
            raise InputError(f"{name}.{key} must be {describe(hint)}, got {value!r}")


def _called(target: Any) -> list[Any]:
    """A callable; of a class, the __init__ of it and of the bases that it passes options on to."""
    if not inspect.isclass(target):
        return [target]
    return [vars(base)["__init__"] for base in target.__mro__ if "__init__" in vars(base)]


def describe(hint: Any) -> str:
    """A plain type in words."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(describe, get_args(hint)))
    words = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}
    return words.get(hint, "text")


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a type; types that are not plain take every value."""
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint in (int, float):
        numbers = int if hint is int else int | float
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, NoneType) else True
