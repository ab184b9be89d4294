import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.joining import join, step_batches


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(size: int = 6, **options) -> Data:
    g = generator()
    return Data(
        torch.randn(size, 2, generator=g), torch.randint(2, (size,), generator=g), **options
    )


def tree(size: int, kind: torch.dtype = torch.float32) -> Data:
    g = generator(size)
    input = {"ids": torch.randint(9, (size, 3), generator=g), "x": torch.rand(size, generator=g)}
    return Data(input, torch.rand(size, generator=g).to(kind))


@pytest.mark.parametrize("make", [points, tree])
def test_a_steps_batches_are_the_rows_and_joining_them_copies_nothing(make):
    train, meta, importance = make(6), make(4), torch.tensor([0.5, 1.5])
    rows, others = torch.tensor([4, 1]), torch.tensor([3, 0, 2])
    first, second = step_batches(train, rows, meta, others, generator(), importance)
    for batch, plain in ((first, train.batch(rows, importance)), (second, meta.batch(others))):
        assert tree_map(torch.equal, batch.input, plain.input) in (True, {"ids": True, "x": True})
        assert torch.equal(batch.target, plain.target) and torch.equal(batch.index, plain.index)
        assert batch.size == plain.size and batch.importance is plain.importance
    for a, b in ((first.input, second.input), (first.target, second.target)):
        for whole, x, y in zip(*map(tree_leaves, (join(a, b), a, b)), strict=True):
            assert torch.equal(whole, torch.cat((x, y))) and whole.data_ptr() == x.data_ptr()


def test_what_does_not_fit_side_by_side_is_taken_apart():
    train, meta = tree(6), tree(4, torch.float64)
    meta.input["x"] = torch.rand(4, 2)
    first, second = step_batches(train, torch.arange(2), meta, torch.arange(3), generator())
    assert first.input["x"].shape == (2,) and second.input["x"].shape == (3, 2)
    assert first.target.dtype == torch.float32 and second.target.dtype == torch.float64
    other = points(4)
    first, second = step_batches(train, torch.arange(2), other, torch.arange(3), generator())
    assert first.input["ids"].shape == (2, 3) and torch.equal(second.input, other.input[:3])


def test_a_steps_batches_are_augmented_the_train_set_first():
    def shifted(input, g):
        return input + torch.rand(1, generator=g)

    train, meta, g = points(6, augment=shifted), points(4, augment=shifted), generator()
    first, second = step_batches(train, torch.arange(2), meta, torch.arange(3), g)
    shifts = torch.rand(2, generator=generator())
    assert torch.equal(first.input, train.input[:2] + shifts[0])
    assert torch.equal(second.input, meta.input[:3] + shifts[1])
    assert torch.equal(join(first.input, second.input)[:2], first.input)


@pytest.mark.parametrize(
    "pair",
    [
        lambda x: (x[2:], x[:2]),
        lambda x: (x[:2], x[3:]),
        lambda x: (x[:2], x[1:5]),
        lambda x: (lambda y: (y[:1], y[1:].mT))(x.view(3, 2, 2).clone()),
        lambda x: (lambda y: (y[:1].mT, y[1:]))(x.view(3, 2, 2).clone()),
        lambda x: (lambda y: (y[:1].mT, y[1:].mT))(x.view(3, 2, 2).mT.clone()),
        lambda x: (x[::2], x[3:]),
        lambda x: (x[1:3], x[2:]),
        lambda x: (x.view(3, 4)[:1], x.view(3, 4)[1:]),
        lambda x: (x[:2], x[2:] + 1),
        lambda x: (x[:2].clone(), x[2:]),
        lambda x: (x.T[:1], x.T[1:]),
        lambda x: (x[:2].requires_grad_(), x[2:]),
    ],
)
def test_other_views_of_one_tensor_are_joined_as_they_are(pair):
    first, second = pair(torch.arange(12.0).view(6, 2).clone())
    found = join(first, second)
    assert torch.equal(found, torch.cat((first, second)))
    assert found.requires_grad == first.requires_grad


def test_inputs_that_are_trees_are_joined_leaf_by_leaf():
    first = {"a": torch.zeros(2, 3), "b": (torch.zeros(2),)}
    second = {"a": torch.ones(1, 3), "b": (torch.ones(1),)}
    found = join(first, second)
    assert found["a"].shape == (3, 3) and found["b"][0].tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4)),
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}),
        (torch.zeros(2), (torch.zeros(2), torch.zeros(2))),
    ],
)
def test_inputs_of_different_form_are_refused(first, second):
    with pytest.raises(InputError, match="train and meta inputs must have the same form"):
        join(first, second)
