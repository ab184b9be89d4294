"""Two processes that run one chain make what one process makes; what they cannot is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bads_ppl.errors import InputError
from bads_ppl.ranks import ALONE, Ranks
from bads_ppl.shards import Shards, check_shardable
from models import joint
from tests.bads_ppl.rank_cases import CASES, made, sets, state

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("rank_cases.py")
pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs torch.distributed with gloo",
)


def start(code: list[str], folder: Path, size: int = 2) -> list[subprocess.Popen[str]]:
    """Processes that are told their numbers."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            [sys.executable, *code],
            env={**shared, "RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit codes and what was printed."""
    try:
        said = [process.communicate(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out + err) for p, (out, err) in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """The states of all chains as both of two processes have them."""
    folder = tmp_path_factory.mktemp("ranks")
    found = ended(start([str(SCRIPT), str(folder / "meeting"), str(folder), *CASES], folder))
    assert [code for code, _ in found] == [0, 0], found
    return folder


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    if not one.numel():
        return 0.0
    one, other = one.double(), other.double()
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-12))


TOLERANCE = dict.fromkeys(CASES, 1e-5) | {
    "reverted-network": 3e-4,
    "lora": 2e-3,
    "sharded-lora": 2e-3,
}
"""A Revert companion's gain is a small difference of losses, in which rounding is larger."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "normed"])
def test_two_processes_make_the_chain_that_one_makes(name, together):
    alone = state(name)
    both = [load_file(together / f"{name}-{rank}.safetensors") for rank in range(2)]
    assert alone.keys() == both[0].keys() == both[1].keys()
    assert [key for key in alone if not torch.equal(both[0][key], both[1][key])] == []
    far = {key: apart(alone[key], both[0][key]) for key in alone}
    assert {key: value for key, value in far.items() if value > TOLERANCE[name]} == {}
    theta = [value for key, value in far.items() if "network/theta" in key]
    assert theta and max(theta) < (1e-4 if name == "sharded-lora" else 1e-5)  # small gradients


@pytest.mark.slow
def test_statistics_of_batch_normalisation_are_means_over_processes(together):
    """Each process normalises by the rows that it has."""
    both = [load_file(together / f"normed-{rank}.safetensors") for rank in range(2)]
    assert [key for key in both[0] if not torch.equal(both[0][key], both[1][key])] == []
    kernel = CASES["normed"](ranks=ALONE)
    train, meta = sets()
    kernel.setup(4, train, meta)
    first = kernel.latents.networks["theta"].module[0]  # as it is before the step
    rows = [train.input[kernel.train_rows.next().index], meta.input[kernel.meta_rows.next().index]]
    seen = [first(torch.cat([part[rank::2] for part in rows])).detach() for rank in range(2)]
    mean = sum(0.1 * part.mean(0) for part in seen) / 2
    spread = sum(0.9 + 0.1 * part.var(0) for part in seen) / 2
    buffers = "latents/buffer/theta/1."
    assert torch.allclose(both[0][f"{buffers}running_mean"], mean, atol=1e-6)
    assert torch.allclose(both[0][f"{buffers}running_var"], spread, atol=1e-6)


# ------------------------------------------------------------------------- what goes wrong

DRIFT = """
import sys, torch
from tests.bads_ppl.rank_cases import CASES, meet, sets
ranks = meet(sys.argv[1])
kernel = CASES["joint-instance"](ranks=ranks)
kernel.setup(4, *sets())
kernel.step()
kernel.check_together()
if ranks.rank == 1:
    kernel.latents.tables["w"].value[3] += 1e-6
try:
    kernel.check_together()
except RuntimeError as error:
    print(type(error).__name__, error)
"""

LOSS = """
import os, sys, torch
from tests.bads_ppl.rank_cases import CASES, meet, sets
ranks = meet(sys.argv[1])
kernel = CASES["joint-instance"](ranks=ranks)
kernel.setup(4, *sets())
kernel.step()
if ranks.rank == 1:
    os.kill(os.getpid(), 9)
try:
    kernel.step()
except RuntimeError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_states_that_differ_are_named_by_all_processes(tmp_path):
    found = ended(start(["-c", DRIFT, str(tmp_path / "meeting")], tmp_path))
    for code, said in found:
        assert code == 0, said
        assert "RanksError the processes' states differ at step 1, in table/w, and" in said


@pytest.mark.slow
def test_the_end_of_a_process_is_told_by_the_other(tmp_path):
    begun = time.monotonic()
    (code, said), (killed, _) = ended(start(["-c", LOSS, str(tmp_path / "meeting")], tmp_path))
    assert code == 0 and killed == -9, said
    assert "RanksError another process of this run ended" in said
    assert time.monotonic() - begun < 300


@pytest.mark.parametrize(
    ("size", "train", "meta", "message"),
    [
        (2, 7, 4, "train_batch must be a multiple of the number of processes, 2, got 7: take 6 or"),
        (4, 8, 6, "meta_batch must be a multiple of the number of processes, 4, got 6: take 4 or"),
        (9, 8, 9, "train_batch must be a multiple of the number of processes, 9, got 8: take 9"),
        (99, 8, 9, "got 8: the train set has .* only, or .*parallel=chains"),
    ],
)
def test_batches_that_cannot_be_shared_are_refused_with_sizes_that_can(size, train, meta, message):
    kernel = made(joint, ranks=Ranks(0, size), train_batch=train, meta_batch=meta)
    with pytest.raises(InputError, match=message):
        kernel.setup(4, *sets())


def test_shares_are_every_row_once_and_know_the_whole_batch():
    train, _ = sets()
    batch = train.batch(torch.arange(8), torch.linspace(0.5, 1.5, 8))
    shares = [batch.shared(Ranks(rank, 2)) for rank in range(2)]
    assert [share.index.tolist() for share in shares] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    for share in shares:
        assert share.whole is batch
        assert torch.equal(share.input, train.input[share.index])
        assert torch.equal(share.importance, batch.importance[share.index])
    assert batch.shared(ALONE) is batch and batch.whole is batch


def test_networks_that_cannot_be_shared_out_are_refused():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.PReLU())
    check_shardable(network)
    network.scale = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(InputError, match="parameter 'scale' is one number"):
        check_shardable(network)
    del network.scale
    network.generate = lambda input: input
    with pytest.raises(InputError, match="writes texts and cannot be shared out: take parallel"):
        check_shardable(network)


def test_parts_are_all_rows_in_order_also_where_there_are_too_few():
    for rows in (1, 4, 5):
        whole = torch.randn(rows, 3)
        parts = [Shards(Ranks(rank, 2), [whole.shape]).part(0, whole) for rank in range(2)]
        assert torch.equal(torch.cat(parts), whole)
        chunks = list(whole.chunk(2))  # as torch cuts them
        assert [len(part) for part in parts] == [len(x) for x in chunks] + [0] * (2 - len(chunks))


def test_what_chooses_within_a_batch_is_refused():
    train, _ = sets()
    with pytest.raises(InputError, match="2 processes have a share of it each: run this program"):
        train.batch(torch.arange(8)).shared(Ranks(0, 2)).keep(torch.tensor([0]))
