"""Folds of the meta set: what is held out, what is left, and what cannot be split."""

from __future__ import annotations

import pytest
import torch

from bads_ppl.errors import InputError
from inference.folds import fold_rows, held_out, meta_folds
from inference.tasks import Task, mnist10

UNEVEN = torch.tensor([0] * 5 + [1] * 7 + [4] * 3)[torch.randperm(15, generator=torch.Generator())]


@pytest.fixture(scope="module")
def task() -> Task:
    return mnist10(root="none", source="digits", seed=0)


@pytest.mark.parametrize("folds", [2, 3])
def test_folds_part_the_meta_set_and_keep_the_classes(folds):
    rows = fold_rows(UNEVEN, folds, seed=0)
    assert len(rows) == folds
    assert torch.cat(rows).sort().values.tolist() == list(range(15))
    for label, count in ((0, 5), (1, 7), (4, 3)):
        held = [int((UNEVEN[fold] == label).sum()) for fold in rows]
        assert min(held) >= 1 and max(held) - min(held) <= 1 and sum(held) == count


def test_the_seed_draws_the_folds():
    first, again, other = (fold_rows(UNEVEN, 2, seed)[0].tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_a_fold_is_scored_on_and_the_rest_is_the_meta_set(task):
    one, two = held_out(task, "1/2", 0), held_out(task, "2/2", 0)
    for fold, other in ((one, two), (two, one)):
        assert torch.equal(fold.meta.ids, other.test.ids)
        rows = torch.isin(task.meta.ids, fold.test.ids)
        assert int(rows.sum()) == len(task.meta) / 2
        assert torch.equal(fold.test.input, task.meta.input[rows])
        assert torch.equal(fold.test.target, task.meta.target[rows])
        assert fold.train is task.train and fold.groups is task.groups
    assert "meta fold 1/2" in one.dataset


@pytest.mark.parametrize("fold", ["2", "0/2", "3/2", "a/b", "1/2/3", "1/-2", ""])
def test_a_fold_is_a_number_of_a_number(fold, task):
    with pytest.raises(InputError, match=r"fold must be k/K with k from 1 to K, such as 1/2, got"):
        held_out(task, fold, 0)


@pytest.mark.parametrize("folds", [-1, 0, 1, 4])
def test_as_many_folds_as_the_smallest_class_has_points_at_most(folds):
    with pytest.raises(InputError, match=r"folds must be from 2 to 3, .* of class 4, got"):
        fold_rows(UNEVEN, folds, seed=0)


def test_a_class_with_a_single_point_cannot_be_split():
    with pytest.raises(InputError, match=r"1 point of class 7, folds need at least 2 of every"):
        fold_rows(torch.tensor([0, 0, 7, 0]), 2, seed=0)


def test_a_task_of_texts_has_no_folds(writing_task):
    with pytest.raises(InputError, match=r"task numbers writes texts: .* split=validation"):
        held_out(writing_task(), "1/2", 0)
    with pytest.raises(InputError, match=r"task numbers writes texts: .* split=validation"):
        meta_folds(writing_task(), 2, 0)
