"""Likeness to the meta points, against what can be said of a few vectors by hand."""

from __future__ import annotations

import pytest
import torch

from bads_ppl.errors import InputError
from inference.similarity import Embedded, likeness


def at(*degrees: float, length: float = 1.0) -> torch.Tensor:
    """Vectors (N, 2) of these directions."""
    angle = torch.tensor(degrees).deg2rad()
    return length * torch.stack([angle.cos(), angle.sin()], dim=1)


def cosine(degrees: float) -> float:
    return float(torch.tensor(degrees).deg2rad().cos())


def test_the_largest_cosine_similarity_counts_whatever_the_lengths():
    train = Embedded(torch.cat([at(0, 30), at(80, length=50.0)]))
    found = likeness(train, Embedded(at(10, 100, length=3.0)), combine="max")
    assert found.tolist() == pytest.approx([cosine(10), cosine(20), cosine(20)])


def test_with_labels_only_points_of_the_same_label_are_alike_less_what_others_share():
    train = Embedded(at(0, 30, 80), torch.tensor([0, 0, 1]))
    meta = Embedded(at(10, 100), torch.tensor([0, 1]))
    found = likeness(train, meta, combine="max")
    expected = [cosine(10) - cosine(100), cosine(20) - cosine(70), cosine(20) - cosine(70)]
    assert found.tolist() == pytest.approx(expected)
    wrong = likeness(Embedded(at(0), torch.tensor([1])), meta, combine="max")
    assert float(wrong) == pytest.approx(-expected[0])


def test_a_label_that_the_meta_points_lack_is_like_none_of_them():
    meta = Embedded(at(10), torch.tensor([0]))
    train = Embedded(at(10, 190), torch.tensor([2, 0]))
    assert int(likeness(train, meta, combine="max").argmin()) == 0
    assert int(likeness(train, meta).argmin()) == 0


def test_in_turns_every_meta_point_has_its_say():
    """Three points near one meta point, two far from the other but nearest to it."""
    train = Embedded(at(0, 1, 2, 60, 50))
    meta = Embedded(at(0, 90))
    assert likeness(train, meta, combine="max").argsort(descending=True).tolist() == [0, 1, 2, 3, 4]
    turns = likeness(train, meta)
    assert turns.argsort(descending=True).tolist() == [0, 3, 1, 4, 2]
    near = likeness(train, Embedded(at(0, 0.9, 90)))  # what one has taken the next goes without
    assert near.argsort(descending=True).tolist() == [0, 1, 3, 2, 4]
    assert sorted(turns.tolist()) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_in_turns_a_small_class_is_taken_whole_before_a_large_one():
    train = Embedded(at(15, 10, 5, 0, 90, 80), torch.tensor([0, 0, 0, 0, 1, 1]))
    meta = Embedded(at(90, 0), torch.tensor([1, 0]))
    assert likeness(train, meta).argsort(descending=True).tolist() == [4, 3, 5, 2, 1, 0]


def test_in_turns_points_that_no_meta_point_is_like_come_last():
    train = Embedded(at(0, 40, 20), torch.tensor([2, 0, 0]))
    found = likeness(train, Embedded(at(0), torch.tensor([0])))
    assert found.argsort(descending=True).tolist() == [2, 1, 0]


def test_embeddings_of_different_widths_are_refused():
    with pytest.raises(InputError, match=r"got shapes \(2, 3\) and \(1, 2\)"):
        likeness(Embedded(torch.ones(2, 3)), Embedded(at(0)))
