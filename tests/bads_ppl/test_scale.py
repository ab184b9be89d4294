"""What a large train set may cost, and that what is done in pieces equals what is done at once."""

import gc
import resource

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bads_ppl import sites
from bads_ppl.acceptance import acceptance
from bads_ppl.data import Data
from bads_ppl.draws import DrawWriter, read_draws
from bads_ppl.errors import Diverged, InputError
from bads_ppl.minibatches import LARGE, ImportanceMinibatches
from bads_ppl.moments import moments
from bads_ppl.priors import SparsityPrior
from bads_ppl.program import Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.sites import Table, new_table
from bads_ppl.weights import InstanceWeights
from models import joint


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sets(size: int) -> tuple[Data, Data]:
    x, mx = torch.randn(size, 2, generator=generator()), torch.randn(40, 2, generator=generator(1))
    return Data(x, (x[:, 0] > 0).long()), Data(mx, (mx[:, 0] > 0).long(), name="meta")


def made(train: Data, meta: Data, *, total="exact", **options) -> SGLD:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = SparsityPrior(0.05, scale=len(train) / 10, total=total)
        parts = Parts(nn.Linear(2, 2), InstanceWeights(mean=0.05), prior)
    steps = {"theta": 0.1 / len(train), "w": 0.5}
    kernel = SGLD(bind(joint, parts), step_size=steps, generator=generator(2), **options)
    kernel.setup(5, train, meta)
    return kernel


def tensor_bytes() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    storages = [x.untyped_storage() for x in gc.get_objects() if type(x) is Tensor]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


# ten million points


@pytest.mark.parametrize(
    ("minibatches", "disk"), [("uniform", False), ("importance", False), ("importance", True)]
)
def test_ten_million_points_take_8_bytes_each_and_statistics_12(tmp_path, minibatches, disk):
    size, draws = 10**7, 3
    train, meta = sets(size)
    before = tensor_bytes()
    kernel = made(train, meta, minibatches=minibatches, folder=tmp_path if disk else None)
    kept = []
    with DrawWriter(tmp_path, size) as writer:
        for _ in range(draws):
            for _ in range(4):
                kernel.step()
            kernel.check_finite()
            kept.append(kernel.site_values())
            writer.append(kept[-1].numpy(), {"mean_w": kernel.report()["mean_w"]})
    last = kept[-1]
    rows = torch.cat([torch.randint(size, (1000,)), (last != last[0]).nonzero()[:, 0]])
    sampled = torch.stack([w[rows] for w in kept]).double().numpy()
    expected = last.double().mean()
    del kept, last, writer
    assert (tensor_bytes() - before) / size < 8.01
    chain = read_draws(tmp_path)
    assert chain.values["mean_w"][-1] == pytest.approx(float(expected), rel=1e-6)
    found = moments([chain.w], train.ids.numpy())
    assert sum(values.nbytes for values in found) / size == 12
    assert len(rows) > 1500 and sampled.std(axis=0).max() > 0.01
    np.testing.assert_allclose(found.mean[rows], sampled.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.sd[rows], sampled.std(axis=0, ddof=1), atol=1e-7)
    np.testing.assert_allclose(found.above[rows], (sampled > 0.5).mean(axis=0), rtol=1e-6)


# pieces


@pytest.mark.parametrize("shape", [(4096 + 48,), (1000, 3)])
def test_values_and_totals_in_pieces_are_those_of_the_whole(shape, monkeypatch):
    value = torch.randn(shape, generator=generator())
    transform = torch.distributions.transforms.SigmoidTransform()
    table = Table("train", value, transform, torch.zeros(()))
    whole, total = table.values(), table.total()
    assert torch.equal(whole, transform(value))
    monkeypatch.setattr(sites, "PIECE", 1024 if len(shape) == 1 else 64)
    assert torch.equal(table.values(), whole)
    assert float(table.total()) == pytest.approx(float(total), rel=1e-12)


def drawn_at_once(size, batch, block, weights, seed) -> tuple[Tensor, Tensor]:
    """Rows and corrections of a block, with all sums of weights in memory."""
    g, half, weights = generator(seed), batch // 2, weights.double()
    cumulative = weights.cumsum(0)
    height = torch.rand((block, half), generator=g, dtype=torch.float64)
    uniform = torch.randint(size, (block, batch - half), generator=g)
    drawn = torch.searchsorted(cumulative, height * cumulative[-1])
    index, share = torch.cat([uniform, drawn], dim=1), half / batch
    chance = (1 - share) + share * size * weights[index] / cumulative[-1]
    return index, (1 / chance).float()


@pytest.mark.parametrize("piece", [1, 7, 100, 999, 1000, 2000])
@pytest.mark.parametrize("batch", [2, 7])
def test_rows_drawn_in_pieces_are_those_drawn_at_once(piece, batch, monkeypatch):
    monkeypatch.setattr(sites, "PIECE", piece)
    weights = torch.rand(1000, generator=generator(3)) ** 8
    weights[100:300] = 0.0  # pieces that draw nothing
    rows = ImportanceMinibatches(1000, batch, generator(5), weights.__getitem__, block=60)
    index, importance = drawn_at_once(1000, batch, 60, weights, 5)
    for step in range(60):
        found = rows.next()
        assert torch.equal(found.index, index[step])
        assert torch.equal(found.importance, importance[step])


def test_blocks_of_large_sets_are_a_part_of_a_pass():
    def block(size):
        return ImportanceMinibatches(size, 64, generator(), torch.ones(1).expand).block

    assert block(LARGE) == block(LARGE + 64) == block(16 * LARGE) == LARGE // 64
    assert block(32 * LARGE) == 2 * LARGE // 64


def test_rows_left_of_a_longer_block_are_used_before_new_ones():
    weights = torch.rand(50, generator=generator())
    long = ImportanceMinibatches(50, 4, generator(1), weights.__getitem__, block=30)
    short = ImportanceMinibatches(50, 4, generator(1), weights.__getitem__, block=7)
    for _ in range(12):
        long.next()
    short.load_state_dict(long.state_dict())
    for _ in range(18):
        assert torch.equal(short.next().index, long.next().index)
    assert short.next().index.shape == (4,) and short.position == 1


# what is kept in step instead of looked up


@pytest.mark.parametrize("total", ["exact", "running_mean"])
@pytest.mark.parametrize("minibatches", ["uniform", "importance"])
def test_the_reported_mean_is_that_of_the_table(total, minibatches):
    kernel = made(*sets(300), total=total, minibatches=minibatches)
    for _ in range(40):
        kernel.step()
    mean = kernel.latents.tables["w"].values().double().mean()
    assert kernel.report()["mean_w"] == pytest.approx(float(mean), rel=1e-6)
    assert abs(float(mean) - 0.05) > 1e-4  # not where it began


def test_a_weight_that_ran_away_is_divergence_whatever_the_later_rows_are():
    class RunsAway(SGLD):
        def advance(self, group, values, drift, state):
            super().advance(group, values, drift, state)
            if group == "w" and self.steps == 3:
                values[0][4] = float("inf")  # w is 1: no sum of weights shows it

    train, meta = sets(300)
    kernel = made(train, meta)
    kernel.__class__ = RunsAway
    for _ in range(3):
        kernel.step()
    kernel.check_finite()
    kernel.step()
    for _ in range(2):
        with pytest.raises(Diverged):
            kernel.check_finite()
        kernel.step()


def test_a_health_check_leaves_no_mark_on_rows_that_it_moved():
    kernel = made(*sets(300))
    kernel.step()
    before = kernel.latents.tables["w"].value.clone()
    batch, meta = kernel.train.evenly(50), kernel.meta.evenly(20)
    kernel.schedules["w"] = lambda step: 1e38  # proposals that are not finite
    acceptance(kernel, batch, meta, generator(7))
    assert torch.equal(kernel.latents.tables["w"].value, before)
    kernel.check_finite()


# tables on disk


def test_a_table_on_disk_is_that_of_memory_in_a_file_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(sites, "PIECE", 7)
    row = torch.tensor([0.25, -3.0])
    table = new_table(30, row, tmp_path / "new")
    assert torch.equal(table, new_table(30, row, None)) and table.shape == (30, 2)
    assert list((tmp_path / "new").iterdir()) == []
    table[7] = 5.0
    assert table.sum() == 29 * row.sum() + 10


def test_a_table_that_no_disk_can_hold_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"float32 values on the CPU, got torch.float64"):
        new_table(3, torch.zeros((), dtype=torch.float64), tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*: choose another folder"):
            new_table(300, torch.zeros(()), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("minibatches", ["uniform", "importance"])
def test_steps_with_a_table_on_disk_are_those_with_one_in_memory(tmp_path, minibatches):
    kernels = [
        made(*sets(300), minibatches=minibatches, local_steps=2, folder=folder)
        for folder in (None, tmp_path)
    ]
    for _ in range(30):
        for kernel in kernels:
            kernel.step()
    memory, disk = (kernel.state_dict() for kernel in kernels)
    assert memory.keys() == disk.keys()
    assert all(torch.equal(memory[name], disk[name]) for name in memory)
