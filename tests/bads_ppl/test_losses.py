import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import Categorical

from bads_ppl.losses import LossDistribution, cross_entropy, observe


def squared(output, target):
    return 0.5 * (output[:, 0] - target) ** 2


def test_cross_entropy_is_minus_the_log_probability_of_the_label():
    logits, target = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]), torch.tensor([2, 1])
    wanted = -logits.softmax(1).log()[torch.arange(2), target]
    assert torch.allclose(cross_entropy(logits, target), wanted)


@pytest.mark.parametrize("loss", [cross_entropy, lambda output, y: cross_entropy(output, y)])
def test_observing_a_loss_adds_minus_the_loss(loss):
    logits, target = torch.randn(5, 3, generator=torch.Generator()), torch.arange(5) % 3

    def program():
        with pyro.plate("meta", 20, subsample=torch.arange(5)):
            pyro.sample("y", observe(loss, logits, 5), obs=target)

    found = poutine.trace(program).get_trace().log_prob_sum()
    assert torch.allclose(found, -4 * cross_entropy(logits, target).sum())


def test_any_loss_is_a_distribution_over_the_batch():
    output, target = torch.randn(4, 1, generator=torch.Generator()), torch.arange(4.0)
    found = observe(squared, output, 4)
    assert isinstance(found, LossDistribution)
    assert found.batch_shape == (4,) and found.event_shape == ()
    assert torch.equal(found.log_prob(target), -squared(output, target))


def test_squared_error_is_the_gaussian_up_to_a_constant():
    output = torch.randn(4, 1, generator=torch.Generator())
    normal = torch.distributions.Normal(output[:, 0], 1.0)
    apart = observe(squared, output, 4).log_prob(torch.arange(4.0)) - normal.log_prob(
        torch.arange(4.0)
    )
    assert torch.allclose(apart, apart[0].expand(4), atol=1e-5)


def test_outputs_may_be_trees():
    output = {"mean": torch.zeros(3), "other": torch.ones(3)}
    found = observe(lambda out, y: out["mean"] + y, output, 3)
    assert found.log_prob(torch.ones(3)).tolist() == [-1, -1, -1]


def test_a_loss_does_not_expand_to_another_batch():
    found = observe(squared, torch.zeros(3, 1), 3)
    assert found.expand((3,)) is found
    with pytest.raises(ValueError, match=r"cannot expand to \(4,\)"):
        found.expand((4,))


def test_observed_classes_are_the_categorical_of_the_logits():
    g = torch.Generator().manual_seed(0)
    logits, target = 3 * torch.randn(5, 4, generator=g), torch.randint(4, (5,), generator=g)
    found, gradients = [], []
    for build in (lambda x: observe(cross_entropy, x, 5), lambda x: Categorical(logits=x)):
        x = logits.clone().requires_grad_()
        log_prob = build(x).log_prob(target)
        (gradient,) = torch.autograd.grad(log_prob @ torch.arange(5.0), x)
        found.append(log_prob.detach())
        gradients.append(gradient)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_observed_classes_can_be_expanded_enumerated_and_drawn():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    ours, theirs = observe(cross_entropy, logits, 5), Categorical(logits=logits)
    assert torch.allclose(ours.probs, theirs.probs)
    values = theirs.enumerate_support()  # (4, 5): more than one class per point
    assert torch.allclose(ours.log_prob(values), theirs.log_prob(values), atol=1e-6)
    assert torch.equal(ours.enumerate_support(), values)
    wide = ours.expand((3, 5))
    assert wide.batch_shape == (3, 5)
    assert torch.allclose(wide.log_prob(values[:3]), theirs.expand((3, 5)).log_prob(values[:3]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = ours.sample((2000,))
    share = torch.nn.functional.one_hot(drawn, 4).float().mean(0)
    assert (share - theirs.probs).abs().max() < 0.06
