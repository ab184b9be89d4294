"""What each method's weights say about the train set, and that all share one interface."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.losses import cross_entropy
from bads_ppl.priors import NormalPrior, SparsityPrior
from bads_ppl.program import Impact, Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.weights import FixedWeights, InstanceWeights, WeightNetwork
from inference import askllm
from inference.methods import METHODS, instance_weights, method, network_weights
from inference.options import ProxyOptions
from inference.proxies import Proxies
from inference.scores import Points
from inference.setups import Given, Setup
from inference.similarity import Embedded, likeness
from inference.tasks import Task
from models.joint import joint
from models.normalised import normalised
from models.selective import LEARNER, selective

TRAIN, META = 40, 8
SELECTIVE = ["cds", "rho_loss", "classact"]
SCORED = [*SELECTIVE, "rds", "askllm"]
FIXED = sorted(set(METHODS) - {"bads", "blo", *SELECTIVE})
NOWHERE = Path("none")


def task() -> Task:
    generator = torch.Generator().manual_seed(0)

    def data(count: int, first: int, name: str) -> Data:
        ids = torch.arange(first, first + count)
        return Data(torch.randn(count, 3, generator=generator), ids % 2, ids, name=name)

    rare = torch.arange(TRAIN) < 4
    sets = data(TRAIN, 100, "train"), data(META, 500, "meta"), data(6, 900, "test")
    texts = [f"text {k}" for k in range(TRAIN)]
    groups = {"rare": rare, "frequent": ~rare}
    return Task("t", "t", *sets, 2, groups, ("rare",), 0.1, texts=texts)


def noisy_task() -> Task:
    """Four blobs, 60 % of whose train labels are wrong."""
    g = torch.Generator().manual_seed(0)

    def data(count: int, first: int, name: str, wrong: int = 0) -> Data:
        label = torch.arange(count) % 4
        x = torch.randn(count, 2, generator=g)
        x = x + 3.0 * torch.stack([label % 2 * 2 - 1, label // 2 * 2 - 1], dim=1)
        label[:wrong] += torch.randint(1, 4, (wrong,), generator=g)
        return Data(x, label % 4, torch.arange(first, first + count), name=name)

    sets = data(400, 0, "train", wrong=240), data(24, 500, "meta"), data(40, 900, "test")
    right = torch.arange(400) >= 240
    groups = {"right": right, "wrong": ~right}
    return Task("noisy", "noisy", *sets, 4, groups, ("right",), 0.4, right)


def given(
    of: Task, seed: int = 0, sparsity: float = 0.25, cache: Path = NOWHERE, **options
) -> Given:
    width = of.train.input.shape[1]

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, of.classes))

    how = ProxyOptions(steps=150, learning_rate=0.2, prior_scale=1.0)
    cpu = torch.device("cpu")
    return Given(
        model=normalised,
        weights=partial(instance_weights, classes=2, mean=sparsity),
        sparsity=SparsityPrior(sparsity),
        impact=Impact(weight=2.0),
        names=("normalised", "instance"),
        seed=seed,
        proxies=Proxies(of, network, {}, how, cache, cpu, seed, **options),
    )


def setup(name: str, seed: int = 0, sparsity: float = 0.25, **rule) -> Setup:
    return method(name, rule)(task(), given(task(), seed, sparsity))


def scores_after(found: Setup, of: Task, steps: int = 150) -> torch.Tensor:
    """Scores (N_t,) at the end of a chain."""
    if found.membership is None:
        assert found.scores is not None
        return found.scores
    net = given(of).proxies.network
    learner = net() if found.learner is not None else None
    parts = Parts(net(), FixedWeights(torch.zeros(0)), prior=NormalPrior(1.0), learner=learner)
    eta = 2 * 0.2 / found.points
    made = SGLD(
        bind(found.model, parts),
        step_size=lambda step: eta * found.step_factor(step),
        temperature=0.0,
        clip=0.3,
        train_batch=found.train_batch,
        generator=torch.Generator().manual_seed(0),
    )
    made.setup(0, found.train, of.meta)
    for _ in range(steps):
        made.step()
    return found.membership.scores(made)


def test_bads_takes_the_model_weights_and_impact_that_it_is_given():
    found = setup("bads")
    assert found.model is normalised and found.fixed is None
    assert found.sparsity == SparsityPrior(0.25) and found.impact == Impact(weight=2.0)
    assert isinstance(found.weights(nn.Linear(3, 2)), InstanceWeights)
    assert found.names == ("normalised", "instance") and found.points == 10 + META


def test_bilevel_optimisation_is_bads_with_its_own_model_and_weights_that_are_optimised():
    found, like = setup("blo"), setup("bads")
    assert found.optimises and not like.optimises and found.names == ("bilevel", "instance")
    same = {"names": like.names, "weights": like.weights, "train": like.train}
    assert replace(found, optimises=False, **same) == like
    assert found.weights(nn.Linear(3, 2)) == InstanceWeights(mean=0.5, concentration=1.0)


@pytest.mark.parametrize(
    ("name", "weight", "points"),
    [("mixing", 1.0, TRAIN + META), ("meta_only", 0.0, META), ("dup_meta", 1.0, 2 * TRAIN)],
)
def test_a_baseline_gives_every_point_the_weight_of_its_definition(name, weight, points):
    found = setup(name)
    assert found.fixed.tolist() == [weight] * TRAIN
    assert found.points == points


def test_dup_meta_repeats_the_meta_set_to_the_size_of_the_train_set():
    assert setup("dup_meta").impact == Impact(meta=TRAIN / META)
    assert setup("mixing").impact == setup("meta_only").impact == Impact()


def test_random_select_keeps_the_share_beta_and_its_seed_chooses_which():
    found, again, other = setup("random_select"), setup("random_select"), setup("random_select", 1)
    chosen = found.fixed.nonzero().flatten()
    assert len(chosen) == 10 and found.points == 10 + META
    assert torch.equal(found.train.ids, task().train.ids[chosen])
    assert torch.equal(found.fixed, again.fixed) and not torch.equal(found.fixed, other.fixed)


@pytest.mark.parametrize("name", FIXED)
def test_baselines_run_the_joint_program_with_fixed_weights_for_the_points_they_train_on(name):
    found = setup(name)
    weights = found.weights(nn.Linear(3, 2))
    assert found.model is joint and found.names == ("joint", "fixed") and found.sparsity is None
    assert isinstance(weights, FixedWeights) and len(weights.values) == len(found.train)
    assert len(found.fixed) == TRAIN


# by scores


@pytest.mark.parametrize("name", SCORED)
def test_a_method_with_scores_costs_nothing_until_it_is_prepared(name, tmp_path):
    found = method(name)(task(), given(task(), cache=tmp_path / "cache"))
    assert found.prepare is not None and not (tmp_path / "cache").exists()
    assert found.scores.tolist() == [0.0] * TRAIN and not found.latent
    assert setup("mixing").prepared().digest is None


@pytest.mark.parametrize("name", SELECTIVE)
def test_selective_methods_keep_the_share_beta_of_a_super_batch(name):
    found = setup(name, super_batch=16)
    assert found.model.func is selective and found.names == ("selective", "scores")
    assert found.train_batch == 16 and setup(name).train_batch == TRAIN  # no larger than the set
    assert found.fixed is None and found.membership.share.floor == 0.25
    assert found.points == 10 + META and found.sparsity is None and found.impact == Impact()
    assert (found.learner is not None) == (name == "classact")
    half_life = found.membership.share.half_life
    assert (half_life is not None) == (name == "cds")
    expected = (10 + META) / (TRAIN + META) if name == "cds" else 1.0
    assert found.step_factor(0) == pytest.approx(expected)
    assert found.step_factor(10_000) == pytest.approx(1.0)
    with pytest.raises(InputError, match="super_batch must be at least 1 row, got 0"):
        setup(name, super_batch=0)


@pytest.mark.parametrize("name", SELECTIVE)
@pytest.mark.parametrize(
    ("train_batch", "rows"),
    [(4, 16), (1, 4), (16, TRAIN), (None, TRAIN)],  # no more than there are
)
def test_a_super_batch_is_one_of_which_a_batch_is_kept(name, train_batch, rows):
    found = method(name)(task(), replace(given(task()), train_batch=train_batch))
    assert found.train_batch == rows


def test_a_super_batch_is_bounded_but_holds_the_batch_that_is_kept(monkeypatch):
    monkeypatch.setattr("inference.scored_methods.MOST", 10)
    rows = [
        method("rho_loss")(task(), replace(given(task()), train_batch=kept)).train_batch
        for kept in (2, 4, 12)
    ]
    assert rows == [8, 10, 12]


@pytest.mark.parametrize("name", [*SELECTIVE, "rds"])
def test_scores_tell_right_labels_from_wrong_ones_where_most_are_wrong(name, tmp_path):
    of = noisy_task()
    found = method(name)(of, given(of, sparsity=0.4, cache=tmp_path)).prepared()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        score = scores_after(found, of)
    assert roc_auc_score(of.right, score) > 0.85
    if found.fixed is not None:
        assert found.fixed.sum() == 160 and found.points == 160 + 24
        assert set(found.train.ids.tolist()) == set(score.argsort(descending=True)[:160].tolist())


def test_the_contrast_of_cds_is_the_gain_of_the_tuned_proxy(tmp_path):
    of = noisy_task()
    context = given(of, sparsity=0.4, cache=tmp_path)
    found = method("cds", {"tuning_steps": 30, "tuning_rate": 0.05})(of, context).prepared()
    before = context.proxies.trained("train")
    after = context.proxies.tuned(before, steps=30, learning_rate=0.05)
    losses = [cross_entropy(p.network(of.train.input), of.train.target) for p in (before, after)]
    assert torch.allclose(found.scores, (losses[0] - losses[1]).detach(), atol=1e-5)


@pytest.mark.parametrize(("name", "group"), [("rho_loss", "theta"), ("classact", LEARNER)])
def test_reference_losses_are_those_of_a_proxy_of_the_meta_set(name, group, tmp_path):
    of = noisy_task()
    context = given(of, sparsity=0.4, cache=tmp_path)
    found = method(name)(of, context).prepared()
    proxy = context.proxies.trained("meta")
    loss = cross_entropy(proxy.network(of.train.input), of.train.target)
    assert torch.allclose(found.scores, -loss.detach(), atol=1e-5)
    assert found.model.keywords["loss_of"] == group


def test_rds_compares_the_embeddings_of_the_proxy_that_it_names(tmp_path):
    of = noisy_task()

    def chosen(**rule) -> torch.Tensor:
        context = given(of, sparsity=0.4, cache=tmp_path)
        return method("rds", rule)(of, context).prepared().scores

    both, meta, plain = chosen(), chosen(trained_on="meta"), chosen(label=False, combine="max")
    assert not torch.equal(both, meta) and len(list(tmp_path.glob("proxy-*"))) == 2
    assert roc_auc_score(of.right, both) > roc_auc_score(of.right, plain) + 0.1


def test_rds_compares_inputs_themselves_where_no_network_is_to_embed_them(tmp_path):
    of = noisy_task()
    context = given(of, sparsity=0.4, cache=tmp_path)
    found = method("rds", {"trained_on": "none"})(of, context).prepared()
    ours, theirs = (Embedded(one.input, one.target) for one in (of.train, of.meta))
    assert torch.equal(found.scores, likeness(ours, theirs))
    assert [path.name[:4] for path in tmp_path.glob("*.safetensors")] == ["rds-"]  # no proxy
    train = of.train
    for other in (train.input[:, None], train.input.long(), {"ids": train.input}):
        other = replace(of, train=Data(other, train.target, train.ids))
        with pytest.raises(InputError, match=r"trained_on=none compares .* those of task noisy"):
            method("rds", {"trained_on": "none"})(other, context)


def test_scores_are_the_same_every_time_and_another_digest_tells_others(tmp_path):
    of = noisy_task()

    def digest(seed: int, cache: str) -> str:
        return method("rho_loss")(of, given(of, seed, 0.4, tmp_path / cache)).prepared().digest

    first = digest(0, "a")
    assert first == digest(0, "a") == digest(0, "b") != digest(1, "a")


def test_ask_llm_takes_the_share_of_which_the_model_is_surest(monkeypatch, tmp_path):
    asked: list[askllm.Question] = []

    def ask(texts, question, *, cache, device):
        asked.append(question)
        assert list(texts) == task().texts and cache == tmp_path
        return torch.linspace(0, 1, TRAIN)

    monkeypatch.setattr(askllm, "ask", ask)
    rule = {"model": "m", "job": "sums", "batch": 2, "max_tokens": 9}
    found = method("askllm", rule)(task(), given(task(), cache=tmp_path)).prepared()
    assert asked == [askllm.Question("m", "sums", 2, 9)]
    assert found.fixed.nonzero().flatten().tolist() == list(range(30, TRAIN))
    assert torch.equal(found.scores, torch.linspace(0, 1, TRAIN))


def test_ask_llm_refuses_tasks_whose_points_are_no_texts():
    of = noisy_task()
    with pytest.raises(InputError, match=r"askllm is for tasks whose points are texts, .* noisy"):
        method("askllm")(of, given(of))


def test_a_table_of_texts_in_another_order_is_refused(tmp_path):
    from inference.scores import score_table

    texts = task().texts
    score_table(tmp_path, "askllm", Points.of_texts(texts[::-1]), lambda rows: rows, {})
    (path,) = tmp_path.glob("*.safetensors")
    context = given(task(), cache=tmp_path, scores=path)
    with pytest.raises(InputError, match="the points in another order"):
        method("askllm")(task(), context).prepared()


def test_a_table_that_is_named_takes_the_place_of_proxies(tmp_path):
    of = noisy_task()
    found = method("rds")(of, given(of, sparsity=0.4, cache=tmp_path)).prepared()
    (path,) = tmp_path.glob("rds-*.safetensors")
    context = given(of, sparsity=0.4, cache=tmp_path / "other", scores=path)
    again = method("rds")(of, context).prepared()
    assert torch.equal(again.fixed, found.fixed) and not (tmp_path / "other").exists()
    with pytest.raises(InputError, match="holds scores of rds, expected those of rho_loss"):
        method("rho_loss")(of, context).prepared()
    flipped = replace(of, train=of.train.subset(torch.arange(400).flip(0)))
    with pytest.raises(InputError, match="the points in another order"):
        method("rds")(flipped, context).prepared()


def test_an_unknown_method_is_refused_with_the_names_there_are():
    with pytest.raises(InputError) as refused:
        method("bda")
    assert "got 'bda'" in str(refused.value)
    assert all(repr(name) in str(refused.value) for name in METHODS)


def test_an_option_that_a_method_does_not_have_is_refused():
    with pytest.raises(InputError, match=r"no option method.rule.half_lif: did you mean half_life"):
        method("cds", {"half_lif": 3})
    with pytest.raises(InputError, match=r"no option method.rule.half_life: there are none"):
        method("mixing", {"half_life": 3})
    with pytest.raises(InputError, match=r"rule.combine must be one of max, round_robin, got 'min"):
        method("rds", {"combine": "min"})


def test_a_weight_network_fits_the_embedding_and_the_labels_of_the_task():
    network = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2))
    plain = network_weights(network, classes=2, initial=0.2)
    labelled = network_weights(network, classes=2, label=True)
    assert isinstance(plain, WeightNetwork) and isinstance(labelled, WeightNetwork)
    assert (plain.linear.in_features, labelled.linear.in_features) == (7, 9)
    w = plain(torch.randn(5, 7), torch.zeros(5, dtype=torch.int64))
    assert w.tolist() == pytest.approx([0.2] * 5)
