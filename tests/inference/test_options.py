"""Unknown and mistyped options are refused by name, whoever's callable they belong to."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from bads_ppl.errors import InputError
from inference.options import Schema, build, check_arguments, check_options, fits


def model(
    train: Any,
    meta: Any,
    parts: Any,
    *,
    strength: float = 1.0,
    kind: Literal["soft", "hard"] = "soft",
    window: int | None = None,
) -> None:
    """A user's program, with options of its own."""


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, True),
        (1.5, int, False),
        (True, int, False),
        (True, bool, True),
        (1, bool, False),
        ("1", float, False),
        (None, float, False),
        (None, int | None, True),
        ("x", int | None, False),
        ("soft", Literal["soft", "hard"], True),
        ("sotf", Literal["soft", "hard"], False),
        ("anything", Any, True),
        ([1], list[int], True),
    ],
)
def test_plain_types_are_checked_and_others_are_not(value, hint, expected):
    assert fits(value, hint) is expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": "abc"}, "model.strength must be a number, got 'abc'"),
        ({"window": 2.5}, "model.window must be a whole number or null, got 2.5"),
        ({"kind": "sotf"}, "model.kind must be one of soft, hard, got 'sotf'"),
        ({"strenght": 1.0}, "there is no option model.strenght: did you mean strength?"),
        ({"colour": 1}, "there is no option model.colour: there are kind, strength, window"),
    ],
)
def test_an_option_that_the_signature_does_not_take_is_refused(options, message):
    with pytest.raises(InputError) as error:
        check_arguments(partial(model, **options), "model")
    assert str(error.value) == message


def test_options_that_fit_are_bound():
    bound = build(
        OmegaConf.create(
            {"_target_": "models.normalised", "_partial_": True, "window": 7, "contrast": 2}
        ),
        "model",
    )
    assert bound.keywords == {"window": 7, "contrast": 2}


def test_a_callable_that_is_not_partial_is_called_with_what_is_given_too():
    node = OmegaConf.create({"_target_": "builtins.dict", "a": 1})
    assert build(node, "task.data", b=2) == {"a": 1, "b": 2}


@pytest.mark.parametrize("name", ["no_such_module.model", "models.no_such_model", "nodots"])
def test_a_target_that_is_not_there_is_refused_with_the_way_to_name_one(name):
    with pytest.raises(InputError, match=r"model\._target_ must be the full name .* PYTHONPATH"):
        build(OmegaConf.create({"_target_": name, "_partial_": True}), "model")


def test_an_error_of_the_callable_itself_stays_what_it_is():
    node = OmegaConf.create({"_target_": "bads_ppl.priors.SparsityPrior", "sparsity": 5})
    with pytest.raises(InputError, match=r"sparsity must be in \(0, 1\), got 5"):
        build(node, "prior")


@pytest.mark.parametrize("option", ["stesp", "data.rot", "method.learningrate", "weights.stepsize"])
def test_options_added_with_a_plus_must_be_options(option):
    config = OmegaConf.structured(Schema)
    check_options(config)
    OmegaConf.update(config, option, 1, force_add=True)
    with pytest.raises(InputError, match=f"there is no option {option}: did you mean "):
        check_options(config)
