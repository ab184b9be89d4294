import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.primitives import Restart
from bads_ppl.priors import NormalPrior
from bads_ppl.sites import NetworkSite
from bads_ppl.snapshots import Snapshots, drop_snapshots, save_snapshot
from bads_ppl.weights import WeightNetwork


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def body() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))


def sites(**modules) -> dict[str, NetworkSite]:
    return {name: NetworkSite(name, m, NormalPrior(), None) for name, m in modules.items()}


@pytest.fixture
def run_dir(tmp_path):
    """Two chains with two networks each, and the networks as they were."""
    kept = []
    for chain in range(2):
        folder = tmp_path / f"chain-{chain}"
        folder.mkdir()
        for draw in (5, 10):
            network, weights = body(), WeightNetwork(4, classes=2)
            with torch.no_grad():
                weights.linear.weight.normal_(generator=generator(10 * chain + draw))
            network(torch.randn(20, 3))  # running statistics of its own
            save_snapshot(folder, draw, sites(theta=network, phi=weights))
            kept.append((network.eval(), weights))
    return tmp_path, kept


def points(size: int = 9) -> Data:
    return Data(torch.randn(size, 3, generator=generator()), torch.arange(size) % 2, name="new")


def test_predictions_are_the_mean_of_those_of_the_networks(run_dir):
    folder, kept = run_dir
    data = points()
    snapshots = Snapshots(folder)
    assert len(snapshots) == 4
    wanted = torch.stack([network(data.input).softmax(1) for network, _ in kept]).mean(0)
    found = snapshots.predict(body(), data)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert torch.allclose(found.sum(1), torch.ones(9))


def test_predictions_of_more_points_than_a_block_keep_their_order(run_dir):
    folder, kept = run_dir
    data = points(5000)
    wanted = torch.stack([network(data.input).softmax(1) for network, _ in kept]).mean(0)
    assert torch.allclose(Snapshots(folder).predict(body(), data), wanted, atol=1e-5)


def test_a_link_says_what_is_averaged(run_dir):
    folder, kept = run_dir
    data = points()
    wanted = torch.stack([network(data.input)[:, 0] ** 2 for network, _ in kept]).mean(0)
    found = Snapshots(folder).predict(body(), data, link=lambda output: output[:, 0] ** 2)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_predicting_leaves_the_mode_of_the_network(run_dir):
    network = body()
    Snapshots(run_dir[0]).predict(network, points())
    assert network.training and network[2].training


def test_new_points_get_mean_and_sd_of_their_weights(run_dir):
    folder, kept = run_dir
    data = points()
    by_hand = []
    for network, weights in kept:
        embedding = network[:3](data.input)
        by_hand.append(weights(embedding, data.target))
    wanted = torch.stack(by_hand)
    mean, sd = Snapshots(folder).weigh(body(), WeightNetwork(4, classes=2), data)
    assert torch.allclose(mean, wanted.mean(0), atol=1e-6)
    assert torch.allclose(sd, wanted.std(0, unbiased=False), atol=1e-6)
    assert ((mean > 0) & (mean < 1)).all() and (sd > 0).all() and not mean.requires_grad


def test_the_head_may_be_named(tmp_path):
    (tmp_path / "chain-0").mkdir()
    network, weights = body(), WeightNetwork(3)
    with torch.no_grad():
        weights.linear.weight.fill_(1.0)
    save_snapshot(tmp_path / "chain-0", 1, sites(theta=network, phi=weights))
    again, data = body(), points()
    mean, sd = Snapshots(tmp_path).weigh(again, WeightNetwork(3), data, head=again[0])
    assert torch.allclose(mean, weights(data.input, data.target), atol=1e-6)
    assert mean.std() > 0.1
    assert torch.equal(sd, torch.zeros(9))


def test_companions_are_left_out(tmp_path):
    (tmp_path / "chain-0").mkdir()
    found = sites(theta=body())
    found["auxiliary"] = NetworkSite("auxiliary", body(), NormalPrior(), Restart("theta"))
    save_snapshot(tmp_path / "chain-0", 1, found)
    with pytest.raises(InputError, match="holds no 'auxiliary'"):
        next(Snapshots(tmp_path)._each(auxiliary=body()))


def test_tied_parameters_are_kept(tmp_path):
    (tmp_path / "chain-0").mkdir()

    def tied():
        network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        network[1].weight = network[0].weight
        return network

    network = tied()
    save_snapshot(tmp_path / "chain-0", 1, sites(theta=network))
    found = Snapshots(tmp_path).predict(tied(), points(), link=lambda output: output)
    assert torch.allclose(found, network(points().input))


def half_frozen(seed: int) -> nn.Module:
    """A network whose first layer is frozen, and is used twice under two names."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = nn.Linear(3, 3).requires_grad_(False)
        return nn.Sequential(first, nn.BatchNorm1d(3), first, nn.Linear(3, 2))


def test_frozen_parameters_are_the_network_s_own_and_are_not_stored(tmp_path):
    (tmp_path / "chain-0").mkdir()
    network = half_frozen(0)
    with torch.no_grad():
        network[3].weight.fill_(0.5)
    network(torch.randn(20, 3))
    save_snapshot(tmp_path / "chain-0", 1, sites(theta=network))
    (path,) = Snapshots(tmp_path).paths
    kept = {key.removeprefix("theta/") for key in load_file(path)}
    buffers = {f"1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    trained = {"1.weight", "1.bias", "3.weight", "3.bias"}
    assert kept == buffers | trained | {"theta.frozen"}
    again = half_frozen(0)
    own = again[0].weight
    found = Snapshots(tmp_path).predict(again, points(), link=lambda output: output)
    assert torch.equal(found, network.eval()(points().input)) and again[0].weight is own
    with pytest.raises(InputError, match="frozen parameters are others: give a network that is"):
        Snapshots(tmp_path).predict(half_frozen(1), points())


def test_a_file_that_holds_frozen_parameters_too_is_read(tmp_path):
    (tmp_path / "chain-0").mkdir()
    network = half_frozen(0)
    state = {f"theta/{key}": value.clone() for key, value in network.state_dict().items()}
    save_file(state, tmp_path / "chain-0" / "snapshot-000001.safetensors")
    found = Snapshots(tmp_path).predict(half_frozen(1), points(), link=lambda output: output)
    assert torch.equal(found, network.eval()(points().input))


def test_networks_of_later_draws_are_dropped(run_dir):
    folder = run_dir[0] / "chain-0"
    drop_snapshots(folder, after=5)
    assert [p.name for p in folder.iterdir()] == ["snapshot-000005.safetensors"]
    assert len(Snapshots(run_dir[0])) == 3


def test_a_folder_without_networks_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no networks: give the folder of a finished run"):
        Snapshots(tmp_path)


def test_a_network_of_another_shape_is_refused(run_dir):
    with pytest.raises(InputError, match="holds no 'theta' of this shape"):
        Snapshots(run_dir[0]).predict(nn.Linear(3, 2), points())


def test_a_run_with_a_weight_per_point_cannot_weigh_new_ones(tmp_path):
    (tmp_path / "chain-0").mkdir()
    save_snapshot(tmp_path / "chain-0", 1, sites(theta=body()))
    with pytest.raises(InputError, match=r"holds no 'phi' of this shape: .*\(and weights\)"):
        Snapshots(tmp_path).weigh(body(), WeightNetwork(4), points())


def test_a_damaged_file_is_refused(run_dir):
    path = run_dir[0] / "chain-1" / "snapshot-000005.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"000005.safetensors cannot be read .* it is damaged"):
        Snapshots(run_dir[0]).predict(body(), points())
