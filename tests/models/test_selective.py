"""The selective program: its potential, which rows it keeps, and that looks change nothing."""

from __future__ import annotations

from functools import partial

import pyro
import pytest
import torch
from pyro import poutine
from torch import nn

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.losses import cross_entropy
from bads_ppl.monitors import ThetaMonitor
from bads_ppl.program import Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.weights import FixedWeights
from models import joint, selective
from models.selective import LEARNER, SCORE, Membership, Share, choose

SIZE = 12


def two_sets() -> tuple[Data, Data]:
    g = torch.Generator().manual_seed(1)
    x, mx = torch.randn(SIZE, 2, generator=g), torch.randn(6, 2, generator=g)
    return Data(x, (x[:, 0] > 0).long()), Data(mx, (mx[:, 1] > 0).long(), name="meta")


def network(seed: int = 0, *, norm: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle = nn.BatchNorm1d(3) if norm else nn.Tanh()
        return nn.Sequential(nn.Linear(2, 3), middle, nn.Linear(3, 2))


def parts(norm: bool = False) -> Parts:
    return Parts(network(norm=norm), FixedWeights(torch.zeros(0)), learner=network(9))


SCORES = torch.randn(SIZE, generator=torch.Generator().manual_seed(4))


def kernel(given: Parts | None = None, *, train_batch: int = SIZE, model=selective, **options):
    options = {"scores": SCORES, "share": Share(0.5), **options}
    step_size = options.pop("step_size", 0.01)
    bound = bind(partial(model, **options), given or parts())
    made = SGLD(
        bound,
        step_size=step_size,
        temperature=0.0,
        clip=1.0,
        train_batch=train_batch,
        generator=torch.Generator().manual_seed(0),
    )
    made.setup(0, *two_sets())
    return made


def loss_under(module: nn.Module, data: Data) -> torch.Tensor:
    return cross_entropy(module(data.input), data.target).detach()


@pytest.mark.parametrize("batch", [None, torch.tensor([7, 2, 0, 11, 5])])
@pytest.mark.parametrize("importance", [False, True])
def test_the_potential_is_that_of_weights_one_for_kept_rows_and_zero_for_others(batch, importance):
    train, meta = two_sets()
    rows = torch.arange(SIZE) if batch is None else batch
    correction = torch.linspace(0.5, 1.5, len(rows)) if importance else None
    super_batch = train.batch(rows, correction)
    count = round(0.5 * len(rows))
    kept = rows[SCORES[rows].argsort(descending=True)[:count]]
    weights = torch.zeros(SIZE)
    weights[kept] = 1.0
    found = kernel().latents.potential(super_batch, meta.full())
    fixed = Parts(network(), FixedWeights(weights))
    like = SGLD(bind(joint, fixed), step_size=0.1, generator=torch.Generator())
    like.setup(0, train, meta)
    expected = like.latents.potential(super_batch, meta.full())
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert expected.item() > 1


@pytest.mark.parametrize(("loss_of", "sites"), [(None, 0), ("theta", 0), ("learner", 4)])
def test_scores_are_the_given_part_and_the_present_loss_of_the_named_network(loss_of, sites):
    train, meta = two_sets()
    given = parts()
    program = bind(partial(selective, scores=SCORES, share=Share(0.5), loss_of=loss_of), given)
    made = kernel(given, loss_of=loss_of)
    expected = SCORES.clone()
    if loss_of is not None:
        expected += loss_under(given.network if loss_of == "theta" else given.learner, train)
    assert torch.allclose(made.site_values(SCORE), expected, atol=1e-6)
    trace = poutine.trace(program).get_trace(train.full(), meta.full())
    latent = [name for name in trace.stochastic_nodes if name.startswith(LEARNER)]
    assert len(latent) == sites and trace.nodes[SCORE]["value"].shape == (SIZE,)
    assert trace.nodes["meta_target"]["is_observed"] and torch.isfinite(trace.log_prob_sum())


def test_the_share_halves_from_one_to_its_floor_and_keeps_one_row_at_least():
    share = Share(0.2, half_life=10)
    assert [share(step) for step in (0, 10, 20, 30)] == pytest.approx([1, 0.5, 0.25, 0.2])
    assert [share.count(step, 10) for step in (0, 10, 1000)] == [10, 5, 2]
    assert Share(0.4)(0) == Share(0.4)(999) == 0.4
    assert Share(0.01).count(0, 10) == 1


def test_the_program_follows_the_schedule_by_the_steps_of_its_kernel():
    def kept(made: SGLD) -> int:
        made.latents.potential(made.train.full(), made.meta.full())
        return len(made.latents.terms["train_loss"])

    made = kernel(share=Share(0.25, half_life=2))
    counts = []
    for _ in range(6):
        counts.append(kept(made))
        made.step()
    assert counts == [12, 8, 6, 4, 3, 3]
    again = kernel(share=Share(0.25, half_life=2))
    again.load_state_dict(kernel(share=Share(0.25, half_life=2)).state_dict())
    assert kept(again) == 12
    again.load_state_dict(made.state_dict())
    assert kept(again) == 3


def test_a_resumed_chain_takes_the_steps_of_one_that_was_not_stopped():
    options = {"share": Share(0.25, half_life=4), "loss_of": "learner", "temperature": 0.5}

    def run(made: SGLD, steps: int) -> SGLD:
        for _ in range(steps):
            made.step()
        return made

    with torch.random.fork_rng():
        torch.manual_seed(3)
        half = run(kernel(train_batch=8, **options), 3)
        state, random = half.state_dict(), torch.get_rng_state()
        straight = run(half, 3).state_dict()
        resumed = kernel(train_batch=8, **options)
        resumed.load_state_dict(state)
        torch.set_rng_state(random)
        again = run(resumed, 3).state_dict()
    assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_only_kept_rows_and_the_meta_batch_pass_with_gradients_and_into_running_statistics():
    given = parts(norm=True)
    seen: list[tuple[int, bool, bool]] = []
    given.network[0].register_forward_hook(
        lambda module, inputs, output: seen.append(
            (len(inputs[0]), output.requires_grad, module.training)
        )
    )
    made = kernel(given, loss_of="theta", share=Share(0.25))
    seen.clear()
    count = int(given.network[1].num_batches_tracked)
    made.latents.backward(made.train.full(), made.meta.full())
    assert seen == [(SIZE, False, False), (3 + 6, True, True)]
    assert int(given.network[1].num_batches_tracked) == count + 1


def test_the_learner_descends_on_the_kept_rows_alone():
    given = parts()
    before = [p.detach().clone() for p in given.learner.parameters()]
    train, _ = two_sets()
    score = SCORES + loss_under(given.learner, train)
    kept = score.argsort(descending=True)[:3]
    losses = cross_entropy(given.learner(train.input[kept]), train.target[kept])
    slopes = torch.autograd.grad(losses.sum(), list(given.learner.parameters()))
    made = kernel(given, loss_of="learner", share=Share(0.25))
    made.step()
    for now, value, slope in zip(given.learner.parameters(), before, slopes, strict=True):
        assert torch.allclose(now, value - 0.005 * (slope + value), atol=1e-6)


def test_a_draw_is_in_proportion_to_the_softmax_and_without_replacement():
    score, temperature = torch.tensor([0.0, 1.0, 2.0]), 0.7
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = torch.stack([choose(score, 1, temperature) for _ in range(4000)]).flatten()
        both = torch.stack([choose(score, 2, temperature) for _ in range(4000)])
    chance = (score / temperature).softmax(0)
    found = torch.bincount(first, minlength=3) / 4000
    assert torch.allclose(found, chance, atol=0.03)
    assert bool((both[:, 0] != both[:, 1]).all())
    # Of two drawn, 0 is missing where 1 and 2 come first in either order.
    missing = float((both != 0).all(1).double().mean())
    expected = chance[2] * chance[1] / (1 - chance[2]) + chance[1] * chance[2] / (1 - chance[1])
    assert missing == pytest.approx(float(expected), abs=0.03)
    assert choose(score, 2).tolist() == [2, 1] and choose(torch.zeros(4), 2).tolist() == [0, 1]


def test_draws_and_evaluations_leave_no_trace_in_a_chain_that_samples_its_rows():
    def run(look: bool) -> torch.Tensor:
        made = kernel(train_batch=8, loss_of="theta", temperature=1.0)
        module = made.latents.networks["theta"].module
        monitor = ThetaMonitor(module, cross_entropy, made.train, made.meta, density=False)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            for _ in range(5):
                made.step()
                if look:
                    monitor.on_draw(made)
                    made.site_values(SCORE)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    assert torch.equal(run(look=False), run(look=True))


def test_membership_is_the_top_share_of_the_whole_train_set_by_the_scores_as_they_are():
    made = kernel(train_batch=4, loss_of="theta", share=Share(0.25, half_life=1))
    member = Membership(Share(0.25, half_life=1))
    assert member(made).tolist() == [1.0] * SIZE
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    for _ in range(3):
        made.step()
    module = made.latents.networks["theta"].module
    score = SCORES + loss_under(module, made.train)
    handle = module.register_forward_hook(count)
    w = member(made)
    assert passes == 1  # the scores, and nothing else of the program
    assert sorted(w.nonzero().flatten().tolist()) == sorted(
        score.argsort(descending=True)[:3].tolist()
    )
    assert torch.allclose(member.scores(made), score, atol=1e-6) and passes == 1
    handle.remove()
    made.step()
    assert not torch.equal(member.scores(made), score)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Share(0.0), r"the share to keep must be in \(0, 1\], got 0"),
        (lambda: Share(5), r"must be in \(0, 1\], got 5"),
        (lambda: Share(0.5, half_life=0), "half_life must be a positive number of steps, got 0"),
        (lambda: kernel(temperature=0.0), "temperature of the choice must be positive, got 0"),
        (
            lambda: kernel(Parts(network(), FixedWeights(torch.zeros(0))), loss_of="learner"),
            "needs a second network: give parts a learner",
        ),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_its_path_is_called_no_posterior_at_any_temperature():
    made = SGLD(
        bind(partial(selective, scores=SCORES, share=Share(0.5)), parts()),
        step_size=0.01,
        generator=torch.Generator().manual_seed(0),
    )
    made.setup(0, *two_sets())
    made.step()
    assert made.evidence == "optimisation path" and not made.latents.has_density
    like = SGLD(
        bind(joint, Parts(network(), FixedWeights(torch.ones(SIZE)))),
        step_size=0.01,
        generator=torch.Generator(),
    )
    like.setup(0, *two_sets())
    assert like.evidence == "calibrated"


def test_it_keeps_no_state_between_calls():
    train, meta = two_sets()
    program = bind(partial(selective, scores=SCORES, share=Share(0.5), loss_of="theta"), parts())

    def density() -> torch.Tensor:
        with torch.random.fork_rng():
            pyro.set_rng_seed(5)
            return poutine.trace(program).get_trace(train.full(), meta.full()).log_prob_sum()

    assert torch.equal(density(), density())
