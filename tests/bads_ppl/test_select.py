import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from bads_ppl import Plan, Selection, select
from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.program import Impact
from bads_ppl.schedules import Warmdown
from bads_ppl.select import describe, find_model
from bads_ppl.snapshots import Snapshots
from bads_ppl.weights import WeightNetwork
from models import joint, normalised

SHORT = Plan(30, burn_in=10, thinning=5)


def clouds(counts: tuple[int, int], seed: int, spread: float = 0.7) -> TensorDataset:
    """Two Gaussian clouds, one per class, at (-1, -1) and (1, 1)."""
    g = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.full((count,), k) for k, count in enumerate(counts)])
    x = spread * torch.randn(len(y), 2, generator=g) + (2.0 * y[:, None] - 1)
    return TensorDataset(x, y)


def flip(dataset: TensorDataset, share: float) -> tuple[TensorDataset, np.ndarray]:
    x, y = dataset.tensors
    flipped = torch.rand(len(y), generator=torch.Generator().manual_seed(7)) < share
    return TensorDataset(x, torch.where(flipped, 1 - y, y)), flipped.numpy()


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))


def short(net=None, train=None, meta=None, **options) -> Selection:
    options = {"plan": SHORT, "chains": 2, "sparsity": 0.5, "device": "cpu", **options}
    return select(
        net if net is not None else network(),
        train if train is not None else clouds((20, 20), 1),
        meta if meta is not None else clouds((5, 5), 2),
        **options,
    )


def accuracy(net: nn.Module, dataset: TensorDataset) -> float:
    x, y = dataset.tensors
    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean())


# what it is for


def test_clean_points_outweigh_flipped_ones_with_joint():
    train, flipped = flip(clouds((100, 100), 1), 0.3)
    net = network()
    selection = select(
        net,
        train,
        clouds((10, 10), 2),
        sparsity=0.5,
        model="joint",
        impact=Impact(weight=20.0),  # at 1 a point moves its weight by exp(-w l) at most
        chains=2,
        seed=0,
        plan=Plan(500),
        device="cpu",
    )
    clean, wrong = selection.mean[~flipped], selection.mean[flipped]
    assert clean.mean() > 5 * wrong.mean()
    assert (clean[:, None] > wrong[None, :]).mean() > 0.95  # area under the ROC curve
    assert accuracy(net, clouds((200, 200), 3)) > 0.95


def test_rare_points_outweigh_frequent_ones_with_the_default_model():
    net = network()
    selection = select(
        net,
        clouds((285, 15), 1),
        clouds((8, 8), 2),
        sparsity=0.1,
        chains=2,
        seed=0,
        plan=Plan(800),
        device="cpu",
    )
    frequent, rare = selection.mean[:285], selection.mean[285:]
    assert rare.mean() > 3 * frequent.mean()
    assert accuracy(net, clouds((200, 200), 3)) > 0.9


def test_a_regression_with_its_own_loss_finds_the_wrong_targets():
    g = torch.Generator().manual_seed(0)
    x, mx = torch.randn(80, 1, generator=g), torch.randn(15, 1, generator=g)
    y, my = 2 * x[:, 0], 2 * mx[:, 0]
    y[:20] += 3
    net = nn.Linear(1, 1)

    def squared(output, target):
        return 0.5 * (output[:, 0] - target) ** 2

    selection = select(
        net,
        TensorDataset(x, y),
        TensorDataset(mx, my),
        loss=squared,
        model="joint",
        sparsity=0.5,
        chains=1,
        plan=Plan(600),
        prior_scale=5.0,
        device="cpu",
    )
    assert selection.mean[20:].mean() > 1.5 * selection.mean[:20].mean()
    assert float(net.weight.detach()) == pytest.approx(2, abs=0.3)
    assert abs(float(net.bias.detach())) < 0.5


# what it takes


def test_the_selection_has_one_entry_per_train_point_and_pools_the_chains():
    selection = short()
    assert len(selection) == 40 and selection.ids.tolist() == list(range(40))
    assert selection.chains == 2 and selection.draws == 2 * SHORT.draws
    assert ((selection.mean > 0) & (selection.mean < 1)).all() and (selection.sd > 0).all()


class Numbered(Dataset):
    def __init__(self, dataset, first):
        self.dataset, self.first = dataset, first

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, place):
        x, y = self.dataset[place]
        return self.first + 10 * place, x, int(y)


def test_the_verdict_is_logged_and_each_point_has_its_rhat(caplog):
    selection = short(plan=Plan(60, burn_in=20, thinning=5))
    assert selection.columns["rhat"].shape == (40,) and (selection.columns["rhat"] > 0.9).any()
    (record,) = [r for r in caplog.records if r.name == "bads_ppl.select"]
    assert record.levelname == "WARNING" and record.getMessage().startswith("not converged: ")


def test_results_are_keyed_by_the_ids_of_the_dataset():
    train = Numbered(clouds((20, 20), 1), 500)
    selection = short(train=train, meta=Numbered(clouds((5, 5), 2), 3))
    assert selection.ids.tolist() == [500 + 10 * k for k in range(40)]
    assert np.array_equal(selection.mean, short().mean)  # ids change nothing else


def test_data_in_memory_serve_as_well_as_datasets():
    x, y = clouds((20, 20), 1).tensors
    assert np.array_equal(short(train=Data(x, y)).mean, short().mean)


def test_a_module_is_trained_in_place():
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    short(net)
    assert all(not torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    net(torch.zeros(1, 2)).sum().backward()  # and it can be trained on


def test_a_module_ends_as_the_first_chain_does(tmp_path):
    net = network()
    plan = Plan(30, burn_in=10, thinning=5, snapshots=1)  # its last draw is at the last step
    short(net, plan=plan, run_dir=tmp_path)
    data = Data(*clouds((5, 5), 2).tensors)
    kept = Snapshots(tmp_path)
    kept.paths = kept.paths[:1]
    with torch.no_grad():
        wanted = net(data.input).softmax(1)
    assert torch.allclose(kept.predict(network(4), data), wanted)


def test_a_factory_starts_the_chains_apart():
    made = []

    def factory():
        made.append(nn.Linear(2, 2))
        return made[-1]

    starts = []
    selection = select(
        lambda: starts.append(factory().weight.detach().clone()) or made[-1],
        clouds((20, 20), 1),
        clouds((5, 5), 2),
        sparsity=0.5,
        chains=3,
        plan=SHORT,
        device="cpu",
    )
    assert len(made) == 3 and len({tuple(w.flatten().tolist()) for w in starts}) == 3
    assert selection.chains == 3


@pytest.mark.parametrize("model", ["normalised", "joint"])
def test_a_name_and_a_callable_are_the_same_model(model):
    given = {"normalised": normalised, "joint": joint}[model]
    assert find_model(model) is given
    assert np.array_equal(short(model=model).mean, short(model=given).mean)


def test_any_callable_with_the_signature_is_a_model():
    calls = []

    def own(train, meta, parts):
        calls.append((len(train), len(meta)))
        joint(train, meta, parts)

    found = short(model=own, train_batch=6, meta_batch=4)
    assert (6, 4) in calls
    assert np.array_equal(found.mean, short(model="joint", train_batch=6, meta_batch=4).mean)


def test_a_weight_network_weighs_too_and_scores_new_points(tmp_path):
    selection = short(weights="network", run_dir=tmp_path)
    assert ((selection.mean > 0) & (selection.mean < 1)).all()
    new = Data(*clouds((3, 3), 9).tensors)
    scores, _ = Snapshots(tmp_path).weigh(network(), WeightNetwork(8, initial=0.5), new)
    assert scores.shape == (6,) and ((scores > 0) & (scores < 1)).all()


def test_seeds_give_the_same_selection_again_and_differ():
    torch.manual_seed(1)
    first = short(seed=3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = short(seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(first.mean, again.mean) and np.array_equal(first.sd, again.sd)
    assert not np.array_equal(first.mean, short(seed=4).mean)


def test_nothing_is_left_behind_without_a_run_dir(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        short()
    assert list(tmp_path.iterdir()) == []


# resuming


@pytest.mark.parametrize("model", ["joint", joint, partial(normalised, window=5)])
def test_a_run_is_resumed_from_its_folder(tmp_path, model):
    first, net = short(run_dir=tmp_path, model=model), network()
    with pytest.raises(InputError, match="holds a chain already"):
        short(run_dir=tmp_path, model=model)
    again = short(net, run_dir=tmp_path, model=model, resume=True)
    assert np.array_equal(again.mean, first.mean)
    assert not torch.equal(net[0].weight, network()[0].weight)  # trained, though no step was taken
    longer = short(
        run_dir=tmp_path, model=model, resume=True, plan=Plan(60, burn_in=10, thinning=5)
    )
    assert longer.draws == 2 * 10


@pytest.mark.parametrize(
    "change",
    [
        {"sparsity": 0.4},
        {"model": "joint"},
        {"step_size": {"theta": 1e-3}},
        {"temperature": 1.0},
        {"weight_temperature": 1.0},
        {"prior_scale": 1.0},
        {"impact": Impact(weight=2.0)},
        {"train_batch": 7},
        {
            "loss": lambda output, target: nn.functional.mse_loss(output, output, reduction="none")[
                :, 0
            ]
        },
    ],
)
def test_a_run_with_other_settings_is_not_resumed(tmp_path, change):
    short(run_dir=tmp_path)
    with pytest.raises(InputError, match="its settings is"):
        short(run_dir=tmp_path, resume=True, **change)


class Settings:
    def __call__(self):
        return None


def test_settings_read_the_same_in_every_process():
    found = describe(partial(normalised, clip=2.0, auxiliary="restarted"))
    assert found == "models.normalised.normalised(auxiliary='restarted', clip=2.0)"
    assert describe(Warmdown(1.0, 0.1, 5)) == "Warmdown(start=1.0, end=0.1, steps=5)"
    assert describe(Settings()) == describe(Settings()) and " at 0x" not in describe(Settings())
    assert describe("joint") == "'joint'" and describe(0.1) == "0.1"


# refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "jiont"}, r"one of \['joint', .*'normalised'.*\], got 'jiont'"),
        ({"weights": "fixed"}, "'instance' or 'network', got 'fixed'"),
        ({"sparsity": 5}, r"sparsity must be in \(0, 1\), got 5"),
        ({"sparsity": 0.01}, "0.01 of 40 points is less than one point"),
        ({"chains": 0}, "chains must be at least 1, got 0"),
        ({"device": "tpu"}, "device must be auto"),
        ({"step_size": {"phi": 1e-3}}, r"groups \['phi'\] that the program does not have"),
        ({"train_batch": 41}, "train_batch must be from 1 to the size of the train set, 40"),
        ({"loss": lambda output, target: output.mean()}, r"shape \(4,\).*got \(\)"),
        ({"train": clouds((0, 0), 1)}, "train set must have at least one point"),
        ({"meta": clouds((0, 0), 1)}, "meta set must have at least one point"),
        ({"meta": TensorDataset(torch.zeros(3, 2), torch.tensor([0, 1, 2]))}, "meta labels must"),
        (
            {"train": Numbered(clouds((9, 9), 1), 0), "meta": Numbered(clouds((1, 1), 1), 170)},
            r"got 1 shared ids, the first \[170\]",
        ),
        ({"net": nn.Flatten()}, "no parameter with requires_grad=True"),
    ],
)
def test_input_that_does_not_fit_is_refused(tmp_path: Path, change, message):
    with pytest.raises(InputError, match=message):
        short(**{**change, "run_dir": tmp_path / "run"})
    assert not list(tmp_path.rglob("*.f32"))
