"""What preconditioning is for: one step size for directions of very different scale."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.preconditioned import PreconditionedSGLD

SETS = (
    Data(torch.zeros(6, 1), torch.zeros(6).long()),
    Data(torch.ones(2, 1), torch.zeros(2).long(), name="meta"),
)
SD = torch.tensor([0.1, 1.0]).repeat(200)


def program(train, meta):
    pyro.sample("x", dist.Normal(torch.zeros(400), SD).to_event(1))


def kernel(warmup=500, program=program, **options) -> PreconditionedSGLD:
    options = {"step_size": {"x": 0.02}, "generator": torch.Generator().manual_seed(0), **options}
    made = PreconditionedSGLD(program, **options)
    made.setup(warmup, *SETS)
    return made


def test_the_preconditioner_is_that_of_the_mean_square_gradient():
    """At the stationary state E g^2 = 1 / sd^2, so that G is near (1 + f) m sd / (1 + f m sd)."""
    made = kernel(2000, step_size={"x": 0.005})
    for _ in range(2000):
        made.step()
    found = made.states["x"]["root"][0] ** 2
    mean = (1 / SD).mean()
    expected = 1.1 * mean / (0.1 * mean + 1 / SD)
    ratio = found / expected
    assert ratio.mean() == pytest.approx(1, abs=0.1)
    assert (found[1::2].mean() / found[::2].mean()).item() == pytest.approx(
        (expected[1] / expected[0]).item(), rel=0.1
    )


def test_it_is_frozen_after_warm_up():
    made = kernel(50)
    for _ in range(50):
        made.step()
    before = made.states["x"]["root"][0].clone()
    for _ in range(20):
        made.step()
    assert torch.equal(made.states["x"]["root"][0], before)
    assert before.std() > 0


def test_rows_that_no_batch_had_move_like_the_mean_row():
    def local(train, meta):
        with train.plate("train"):
            pyro.sample("u", dist.Normal(torch.zeros(()), 1.0))

    made = kernel(1, local, step_size={"u": 0.05}, train_batch=2)
    made.step()
    root, visits = made.states["u"]["root"][0], made.states["u"]["visits"][0]
    assert (visits > 0).sum() == 2
    assert len(root[visits == 0].unique()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1"),
        ({"floor": 0.0}, "floor must be positive, got 0"),
        ({"warmup": 0}, "burn-in of 0 steps"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        kernel(**options)
