"""What all samplers share, where it does not show in a posterior: order, bookkeeping, refusals."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC
from torch import nn

from bads_ppl.acceptance import acceptance
from bads_ppl.cyclical import CyclicalSGLD
from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.losses import cross_entropy
from bads_ppl.minibatches import Rows
from bads_ppl.preconditioned import PreconditionedSGLD
from bads_ppl.priors import SparsityPrior
from bads_ppl.program import Parts, bind
from bads_ppl.sghmc import SGHMC
from bads_ppl.sgld import SGLD
from bads_ppl.weights import InstanceWeights
from models import joint, normalised

SAMPLERS = [SGLD, PreconditionedSGLD, SGHMC, CyclicalSGLD]
STEPS = {"theta": 0.01, "w": 0.1}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(size: int = 12) -> tuple[Data, Data]:
    g = generator()
    x, mx = torch.randn(size, 2, generator=g), torch.randn(6, 2, generator=g)
    return Data(x, (x[:, 0] > 0).long()), Data(mx, (mx[:, 0] > 0).long(), name="meta")


def parts() -> Parts:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Parts(nn.Linear(2, 2), InstanceWeights(), SparsityPrior(0.5, scale=2.0))


def made(sampler=SGLD, program=None, warmup=10, sets=None, **options):
    options = {"step_size": STEPS, "generator": generator(1), **options}
    kernel = sampler(program or bind(joint, parts()), **options)
    kernel.setup(warmup, *(sets or data()))
    return kernel


class Given:
    """Minibatches that are always these rows."""

    def __init__(self, index: list[int], importance: list[float]) -> None:
        self.rows = Rows(torch.tensor(index), torch.tensor(importance))
        self.batch_size = len(index)

    def next(self) -> Rows:
        return self.rows


def test_batches_of_both_sets_hold_rows_of_like_length_where_they_are_bucketed():
    train, meta = data()
    sets = (
        Data(train.input, train.target, lengths=torch.arange(12) % 4),
        Data(meta.input, meta.target, name="meta", lengths=torch.arange(6) % 3),
    )
    options = {"sets": sets, "train_batch": 3, "meta_batch": 2}
    for kernel, alike in ((made(**options, bucket=4), True), (made(**options), False)):
        for one, rows in zip(sets, (kernel.train_rows, kernel.meta_rows), strict=True):
            found = [one.lengths[rows.next().index].unique() for _ in range(12)]
            assert all(len(each) == 1 for each in found) == alike


def test_a_row_that_occurs_twice_makes_one_step_of_twice_the_size():
    def program(train, meta):
        with train.plate("train"):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), torch.ones(())))
            pyro.factor("term", 3.0 * z)  # -log p has the gradient z - 3

    kernel = made(program=program, step_size={"z": 0.2}, temperature=0.0, train_batch=3)
    kernel.train_rows = Given([4, 4, 7], [0.5, 0.5, 1.5])
    kernel.step()
    moved = torch.zeros(12)
    moved[4], moved[7] = 0.1 * 3 * (2 * 0.5), 0.1 * 3 * 1.5
    assert torch.allclose(kernel.latents.tables["z"].value, moved, atol=1e-6)


def test_the_noise_of_a_row_that_occurs_twice_is_that_of_one_larger_step():
    def flat(train, meta):
        with train.plate("train"):
            pyro.sample("z", dist.Normal(torch.zeros(()), torch.full((), 1e6)))

    kernel = made(program=flat, step_size={"z": 0.2}, train_batch=3)
    kernel.train_rows = Given([4, 4, 7], [0.5, 0.5, 1.5])
    table, jumps = kernel.latents.tables["z"], []
    for _ in range(4000):
        before = table.value.clone()
        kernel.step()
        jumps.append(table.value - before)
    found = torch.stack(jumps).var(0)[[4, 7]]
    # a variance of 4,000 jumps is known to sqrt(2 / 4000) = 2.2 %: three of those
    assert torch.allclose(found, torch.tensor([0.2 * 1.0, 0.2 * 1.5]), rtol=0.07)


def test_noise_lies_in_memory_as_the_values_do():
    """Every number is used once, in whatever order; values that overlap share none."""
    kernel = made()
    images = torch.empty(4, 3, 2, 2)
    values = [
        images.to(memory_format=torch.channels_last),
        torch.empty(3, 1, 2, 2).to(memory_format=torch.channels_last),
        torch.empty(5, 2),
        torch.empty(2, 5).t(),
        torch.empty(3, 1).expand(3, 4),
        torch.empty(()),
    ]
    g = generator(1)
    g.set_state(kernel.generator.get_state())
    found = kernel._noise("theta", values, 2.0)
    drawn = 2 * torch.randn(sum(value.numel() for value in values), generator=g)
    parts = drawn.split([value.numel() for value in values])
    for part, value, wanted in zip(found, values, parts, strict=True):
        assert part.shape == value.shape
        assert torch.equal(part.flatten().sort().values, wanted.sort().values)
    assert [x.stride() for x in found[:3]] == [x.stride() for x in values[:3]]


def test_extra_local_steps_come_before_the_step_of_all_groups():
    train, meta = data()
    kernel = made(temperature=0.0, local_steps=3, train_batch=12, meta_batch=6)
    network = nn.Linear(2, 2)
    network.load_state_dict(kernel.latents.networks["theta"].module.state_dict())
    u = torch.zeros(12, requires_grad=True)

    def gradients(values):
        w = torch.sigmoid(u)
        energy = (w * cross_entropy(network(train.input), train.target)).sum()
        energy = energy + cross_entropy(network(meta.input), meta.target).sum()
        energy = energy + sum((p**2).sum() for p in network.parameters()) / 2
        energy = energy + (w.sum() - 6) ** 2 / (2 * 2.0**2)
        return torch.autograd.grad(energy, values)

    for _ in range(5):
        kernel.step()
        for _ in range(2):
            (grad,) = gradients([u])
            with torch.no_grad():
                u -= 0.05 * grad
        values = [u, *network.parameters()]
        grads = gradients(values)
        with torch.no_grad():
            for value, grad, eta in zip(values, grads, [0.1, 0.01, 0.01], strict=True):
                value -= eta / 2 * grad
    assert torch.allclose(kernel.latents.tables["w"].value, u, atol=1e-5)
    theta = kernel.latents.networks["theta"].parameters
    for mine, theirs in zip(theta, network.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_local_steps_call_the_network_once():
    calls = []
    made_parts = parts()
    made_parts.network.register_forward_hook(lambda *_: calls.append(1))
    kernel = made(program=bind(joint, made_parts), local_steps=4)
    kernel.step()  # looks at stiffness too
    calls.clear()
    kernel.step()
    assert len(calls) == 1


@pytest.mark.parametrize("friction", [0.1, 0.5, 1.0])
def test_acceptance_of_sghmc_is_that_of_the_langevin_step_it_amounts_to(friction):
    sets = data()
    eta = 2.0
    rate = friction * eta / (2 - friction)
    kernel = made(SGHMC, step_size={"theta": eta, "w": 0.1}, friction={"theta": friction})
    plain = made(SGLD, step_size={"theta": rate, "w": 0.1})
    mine, theirs = (
        acceptance(k, sets[0].full(), sets[1].full(), generator(3)) for k in (kernel, plain)
    )
    assert mine == pytest.approx(theirs) and min(mine.values()) < 1


def test_stiffness_allows_sghmc_the_step_that_momentum_makes_stable():
    def steep(train, meta):
        pyro.sample("x", dist.Normal(torch.zeros(()), torch.full((), 0.1)))  # curvature 100

    made(SGLD, program=steep, step_size={"x": 0.039}).step()
    with pytest.raises(InputError, match=r"steps above 0\.04 run"):
        made(SGLD, program=steep, step_size={"x": 0.041}).step()
    made(SGHMC, program=steep, step_size={"x": 0.74}).step()  # 0.04 * (2 - .1) / .1
    with pytest.raises(InputError, match=r"steps above 0\.76 run"):
        made(SGHMC, program=steep, step_size={"x": 0.78}).step()


def test_draws_after_exploration_are_approximate():
    assert made(CyclicalSGLD, cycle=10).evidence == "approximate"
    assert made(CyclicalSGLD, cycle=10, exploration=0.0).evidence == "calibrated"
    assert made(CyclicalSGLD, cycle=10, mode="paper").evidence == "optimisation path"


def test_a_restarted_companion_takes_over_the_momentum():
    program = bind(
        lambda *a, parts: normalised(*a, parts=parts, auxiliary="restarted", window=3), parts()
    )
    kernel = made(SGHMC, program=program)
    velocity = {name: kernel.states[name]["velocity"] for name in ("theta", "auxiliary")}
    for step in range(1, 7):
        kernel.step()
        same = all(map(torch.equal, velocity["theta"], velocity["auxiliary"]))
        assert same == (step % 3 == 0)


def test_mcmc_counts_warm_up_in_draws():
    kernel = SGLD(bind(joint, parts()), step_size=STEPS, generator=generator(), thinning=3)
    MCMC(kernel, num_samples=4, warmup_steps=5, disable_progbar=True).run(*data())
    assert kernel.warmup_steps == 15 and kernel.steps == 27


@pytest.mark.parametrize("other", SAMPLERS[1:3])
def test_a_checkpoint_of_another_sampler_is_refused(other):
    plain, further = made(), made(other)
    for kernel, state in ((plain, further.state_dict()), (further, plain.state_dict())):
        with pytest.raises(InputError, match="another sampler"):
            kernel.load_state_dict(state)


def test_the_share_of_clipped_rows_is_at_most_one_with_local_steps():
    kernel = made(clip={"w": 1e-9, "theta": 1e-9}, local_steps=4, warmup=0)
    for _ in range(5):
        kernel.step()
    assert kernel.diagnostics()["clipped"] == {"w": 1.0, "theta": 1.0}


def test_a_process_forked_from_the_first_draws_other_numbers(monkeypatch):
    kernel = SGLD(bind(joint, parts()), step_size=STEPS, generator=generator())
    monkeypatch.setattr("os.getpid", lambda: -1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(987)  # as that of a process of its own
        kernel.setup(0, *data())
    assert kernel.generator.initial_seed() == 987
