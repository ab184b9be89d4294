import re
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from bads_ppl.data import Data, check_disjoint
from bads_ppl.errors import InputError
from bads_ppl.latents import Latents
from bads_ppl.losses import cross_entropy
from bads_ppl.priors import NormalPrior, SparsityPrior
from bads_ppl.program import Parts, bind
from bads_ppl.weights import InstanceWeights, WeightNetwork
from models import joint


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(size: int = 6, **options) -> Data:
    g = generator()
    return Data(
        torch.randn(size, 2, generator=g), torch.randint(2, (size,), generator=g), **options
    )


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, place):
        return self.items[place]


# batches


def test_total_scales_the_rows_to_the_set():
    data = points(6)
    value = torch.tensor([1.0, 5.0])
    assert float(data.batch(torch.tensor([0, 3])).total(value)) == 6 / 2 * 6
    assert float(data.full().total(torch.arange(6.0))) == 15


def test_total_is_unbiased_with_importance():
    data, value = points(6), torch.arange(6.0)
    chance = torch.tensor([0.3, 0.1, 0.1, 0.1, 0.1, 0.3])
    mean = sum(
        chance[row] * data.batch(torch.tensor([row]), 1 / (6 * chance[[row]])).total(value[[row]])
        for row in range(6)
    )
    assert float(mean) == pytest.approx(15)


@pytest.mark.parametrize("importance", [None, torch.tensor([0.5, 2.0])])
def test_plate_scales_log_probabilities_as_total_does(importance):
    batch = points(6).batch(torch.tensor([1, 4]), importance)
    value = torch.tensor([-1.0, 3.0])

    def program():
        plate = batch.plate("train")
        with plate:
            pyro.factor("first", value)
        with plate:  # a plate may be entered again
            pyro.factor("second", 2 * value)

    found = poutine.trace(program).get_trace().log_prob_sum()
    assert float(found) == pytest.approx(float(batch.total(3 * value)))


@pytest.mark.parametrize("importance", [None, torch.tensor([0.5, 2.0, 1.0, 4.0])])
def test_rows_that_are_kept_count_as_they_did_in_the_batch(importance):
    batch = points(6).batch(torch.tensor([1, 4, 0, 5]), importance)
    places, value = torch.tensor([3, 1]), torch.tensor([-1.0, 3.0, 7.0, 2.0])
    kept = batch.keep(places)
    assert kept.index.tolist() == [5, 4] and kept.size == 6
    assert torch.equal(kept.input, points(6).input[[5, 4]])
    assert torch.equal(kept.target, points(6).target[[5, 4]])
    member = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert float(kept.total(value[places])) == pytest.approx(float(batch.total(member * value)))


@pytest.mark.parametrize("weights", ["instance", "network"])
def test_traced_log_density_on_full_data_is_the_potential_and_the_priors(weights):
    """Any Pyro handler and the kernel must see one and the same density."""
    train, meta = points(6), points(4, name="meta")
    network = nn.Linear(2, 2)
    source = InstanceWeights(0.3, 0.7)
    if weights == "network":
        source = WeightNetwork(2, classes=2, prior=NormalPrior(1.0))
    program = bind(joint, Parts(network, source, SparsityPrior(0.5, scale=2.0)))
    latents = Latents.find(program, train.full(), meta.full())
    values = {f"theta.{name}": p.detach().clone() for name, p in network.named_parameters()}
    prior = sum(dist.Normal(0.0, 1.0).log_prob(p).sum() for p in values.values())
    if weights == "instance":
        table = latents.tables["w"]
        table.value.normal_(generator=generator(1))
        values["w"] = table.values()
        latents.sums["total_weight"].total.copy_(values["w"].sum())
        latents.temperature = {"w": 0.0}  # no Jacobian: the density of w itself
    else:
        phi = dict(source.named_parameters())
        with torch.no_grad():
            phi["linear.weight"].normal_(generator=generator(1))
        values |= {f"phi.{name}": p.detach().clone() for name, p in phi.items()}
        prior += sum(dist.Normal(0.0, 1.0).log_prob(p.detach()).sum() for p in phi.values())
    trace = poutine.trace(poutine.condition(program, values)).get_trace(train.full(), meta.full())
    wanted = -trace.log_prob_sum()
    found = latents.potential(train.full(), meta.full()).detach() - prior
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    joint_potential = latents.joint_potential(train.full(), meta.full())
    assert float(joint_potential) == pytest.approx(float(wanted), rel=1e-5)


def test_minibatch_trace_estimates_the_full_log_density_without_bias():
    train, meta = points(6), points(4, name="meta")
    program = bind(joint, Parts(nn.Linear(2, 2), InstanceWeights(), None))
    sites = poutine.trace(program).get_trace(train.full(), meta.full())
    values = {name: sites.nodes[name]["value"] for name in ("theta.weight", "theta.bias")}
    w = sites.nodes["w"]["value"]

    def density(rows):
        fixed = poutine.condition(program, {**values, "w": w[rows]})
        return poutine.trace(fixed).get_trace(train.batch(rows), meta.full()).log_prob_sum()

    pairs = torch.combinations(torch.arange(6), 2)
    mean = torch.stack([density(rows) for rows in pairs]).mean()
    assert float(mean) == pytest.approx(float(sites.log_prob_sum()), rel=1e-5)


# sets


def test_ids_default_to_positions_and_subsets_keep_theirs():
    data = points(6)
    assert data.ids.tolist() == list(range(6))
    half = data.subset(torch.tensor([4, 1]), name="half")
    assert half.ids.tolist() == [4, 1] and half.name == "half" and len(half) == 2
    assert torch.equal(half.input, data.input[[4, 1]])
    assert torch.equal(half.target, data.target[[4, 1]])
    assert half.subset(torch.tensor([1])).ids.tolist() == [1]


def test_lengths_stay_with_their_points():
    data = points(lengths=torch.tensor([3, 1, 4, 1, 5, 9]))
    part = data.subset(torch.tensor([5, 2]))
    assert part.lengths.tolist() == [9, 4]
    assert part.subset(torch.tensor([1])).lengths.tolist() == [4]
    assert Data.from_dataset(data, name="meta").lengths is data.lengths
    moved = data.to("meta")  # a device of torch that keeps shapes alone
    assert moved.lengths.shape == (6,) and moved.lengths.device == moved.target.device
    assert moved.lengths.device.type == "meta"


def test_points_without_lengths_have_none_anywhere():
    data = points()
    assert data.lengths is None and data.subset(torch.tensor([2])).lengths is None
    assert data.to("meta").lengths is None


def test_batches_cover_all_rows_once_in_order():
    data = points(6)
    batches = list(data.batches(4))
    assert [len(batch) for batch in batches] == [4, 2]
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(6))
    assert torch.equal(torch.cat([batch.input for batch in batches]), data.input)


def test_dict_inputs_are_taken_leaf_by_leaf():
    data = Data({"a": torch.arange(4.0), "b": torch.arange(8.0).view(4, 2)}, torch.zeros(4))
    batch = data.batch(torch.tensor([3, 0]))
    assert batch.input["a"].tolist() == [3, 0]
    assert batch.input["b"].tolist() == [[6, 7], [0, 1]]
    assert data.subset(torch.tensor([2])).input["b"].tolist() == [[4, 5]]
    assert data.to("cpu") is data


def test_from_dataset_of_pairs_numbers_the_points():
    x, y = torch.randn(5, 3, generator=generator()), torch.arange(5)
    data = Data.from_dataset(TensorDataset(x, y), name="train")
    assert torch.equal(data.input, x) and torch.equal(data.target, y)
    assert data.ids.tolist() == [0, 1, 2, 3, 4] and data.namespace is not None


def test_from_dataset_of_triples_takes_the_index_as_id():
    items = [(70 + k, torch.full((2,), float(k)), k % 2) for k in range(600)]  # more than a block
    data = Data.from_dataset(Items(items), name="train")
    assert data.ids.tolist() == list(range(70, 670)) and data.namespace is None
    assert data.input[:, 0].tolist() == list(range(600))
    assert data.target.tolist() == [k % 2 for k in range(600)]


def test_from_dataset_stacks_dict_inputs():
    items = [({"a": torch.tensor(float(k)), "b": torch.ones(2)}, k) for k in range(3)]
    data = Data.from_dataset(Items(items), name="train")
    assert data.input["a"].tolist() == [0, 1, 2] and data.input["b"].shape == (3, 2)


def test_from_dataset_passes_data_on_under_the_new_name():
    data = points(ids=torch.arange(6) + 9)
    again = Data.from_dataset(data, name="meta")
    assert again.name == "meta" and again.namespace is None and again.input is data.input
    assert data.name == "train"


def test_from_dataset_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Data.from_dataset(TensorDataset(torch.zeros(3, 1), torch.zeros(3)), name="train")
    assert torch.equal(torch.get_rng_state(), before)


# what is refused


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1), 0


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Items([]), "the train set must have at least one point, got 0"),
        (Stream(), "must be a map-style dataset with a length, got Stream"),
        (Items([torch.zeros(2)]), r"\(index, input, target\), got Tensor"),
        (Items([(1, 2, 3, 4)]), "got tuple of length 4"),
        (Items([{"x": 1}]), "got dict"),
        (Items([(torch.zeros(2), 0), (torch.zeros(3), 0)]), "of one shape"),
        (Items([(object(), 0)]), "must be tensors or numbers.*object"),
        (Items([(3, torch.zeros(1), 0), (3, torch.ones(1), 0)]), r"repeated ids \[3\]"),
    ],
)
def test_datasets_that_do_not_fit_are_refused(dataset, message):
    with pytest.raises(InputError, match=message):
        Data.from_dataset(dataset, name="train")


def bad(value: float, place: int) -> torch.Tensor:
    x = torch.zeros(9000, 2)
    x[place, 1] = value
    return x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(0, 2), torch.zeros(0)), "at least one point, got 0"),
        ((torch.zeros(3, 2), torch.zeros(4)), "got 3 inputs and 4 targets"),
        (({"a": torch.zeros(4), "b": torch.zeros(3)}, torch.zeros(4)), "3 inputs and 4 targets"),
        ((torch.zeros(3), torch.zeros(3), torch.arange(2)), "got 2 ids for 3 points"),
        ((torch.zeros(3), torch.zeros(3), torch.tensor([7, 8, 7])), r"repeated ids \[7\]"),
        ((bad(torch.nan, 8999), torch.zeros(9000)), "inputs must be finite.* index 8999"),
        ((bad(torch.inf, 1), torch.zeros(9000)), "inputs must be finite.* index 1:"),
        (
            (torch.zeros(2), torch.tensor([0.0, torch.nan]), torch.tensor([4, 5])),
            "targets must be finite.* index 5",
        ),
    ],
)
def test_points_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Data(*arguments)


@pytest.mark.parametrize("shape", [(5,), (7,), (6, 1), ()])
def test_lengths_that_are_not_one_per_point_are_refused(shape):
    message = rf"meta lengths must be one per point, got shape {re.escape(str(shape))} for 6 points"
    with pytest.raises(InputError, match=message):
        points(lengths=torch.ones(shape), name="meta")


def test_train_and_meta_with_shared_ids_are_refused():
    train = points(ids=torch.arange(6))
    with pytest.raises(InputError, match=r"got 2 shared ids, the first \[4, 5\]"):
        check_disjoint(train, points(3, ids=torch.tensor([4, 9, 5]), name="meta"))
    check_disjoint(train, points(3, ids=torch.tensor([6, 7, 8]), name="meta"))


def test_positions_are_not_taken_for_shared_ids():
    check_disjoint(points(6), points(6, name="meta"))


def test_losses_of_a_batch_agree_with_those_of_its_rows():
    data = points(6)
    network = nn.Linear(2, 2)
    rows = torch.tensor([5, 2])
    batch = data.batch(rows)
    every = cross_entropy(network(data.input), data.target)
    assert torch.allclose(cross_entropy(network(batch.input), batch.target), every[rows])


def test_subsets_of_one_dataset_that_overlap_are_refused():
    whole = torch.utils.data.TensorDataset(torch.arange(10.0)[:, None], torch.zeros(10))
    halves = [torch.utils.data.Subset(whole, rows) for rows in (range(6), [9, 4, 5, 6])]
    train, meta = (Data.from_dataset(half, name="set") for half in halves)
    assert meta.ids.tolist() == [9, 4, 5, 6]
    with pytest.raises(InputError, match=r"2 shared ids, the first .4, 5."):
        check_disjoint(train, meta)
    nested = torch.utils.data.Subset(torch.utils.data.Subset(whole, range(6, 10)), [3, 0])
    assert Data.from_dataset(nested, name="meta").ids.tolist() == [9, 6]
    check_disjoint(train, Data.from_dataset(nested, name="meta"))
    first = Data(torch.zeros(4, 1), torch.zeros(4))
    with pytest.raises(InputError, match="1 shared ids"):
        check_disjoint(first.subset(torch.tensor([0, 1])), first.subset(torch.tensor([1, 2])))
    check_disjoint(first, Data(torch.zeros(4, 1), torch.zeros(4)))


@pytest.mark.parametrize("importance", [None, torch.tensor([0.5, 2.0, 1.0])])
def test_a_plate_is_pyros_own_with_the_correction_around_it(importance):
    data = points()
    batch = data.batch(torch.tensor([1, 4, 2]), importance)
    value = torch.tensor([0.3, 0.6, 0.9])
    logits = torch.randn(3, 2, generator=generator())
    correction = torch.ones(()) if importance is None else importance

    def program(enter):
        with enter():
            pyro.sample("scalar", dist.Normal(0.0, 1.0))  # the plate gives it its shape
            pyro.sample("fits", dist.Normal(torch.zeros(3), 1.0), obs=value)
            pyro.sample("label", dist.Categorical(logits=logits), obs=batch.target)
            pyro.factor("factor", value)
            with pyro.plate("inner", 4, dim=-2):
                pyro.sample("nested", dist.Normal(torch.zeros(3), 1.0))
                pyro.sample("both", dist.Normal(0.0, 1.0), obs=torch.ones(4, 3))

    @contextmanager
    def plain():
        plate = pyro.plate("train", len(data), subsample=batch.index, dim=-1)
        with plate, poutine.scale(scale=correction):
            yield

    traces = []
    for enter in (lambda: batch.plate("train"), plain):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            traces.append(poutine.trace(program).get_trace(enter))
        traces[-1].compute_log_prob()
    ours, theirs = traces
    assert list(ours.nodes) == list(theirs.nodes)
    for name in ("scalar", "fits", "label", "factor", "nested", "both"):
        assert torch.equal(ours.nodes[name]["log_prob"], theirs.nodes[name]["log_prob"])
        stacks = (trace.nodes[name]["cond_indep_stack"] for trace in (ours, theirs))
        assert len({tuple((f.name, f.dim, f.size, f.full_size) for f in s) for s in stacks}) == 1
    assert ours.nodes["nested"]["value"].shape == (4, 3)


def test_a_plate_refuses_what_is_of_another_size():
    with batch_plate(points()), pytest.raises(ValueError, match="Shape mismatch inside plate"):
        poutine.trace(lambda: pyro.sample("x", dist.Normal(torch.zeros(4), 1.0))).get_trace()


def batch_plate(data):
    return data.batch(torch.arange(3)).plate("train")
