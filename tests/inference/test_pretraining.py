"""A small model that is trained on the spot: what it is shown, that it learns, where it is kept."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from bads_ppl.errors import InputError, Stopped
from inference import fitting
from inference.copying import KEPT, LENGTH, PARTS, Copying, Renaming
from inference.pretraining import pretrained_folder
from inference.trained_folders import made_once
from models.language import IGNORED
from models.seq2seq import Seq2Seq
from models.seq2seq_tokens import SIZES, SPECIAL, Pieces, build_folder

NAMES = ("Ann", "Bob", "Cy", "Dora", "Eve")
PAIRS = [(f"{a} | {verb} | {b}", f"{a} {verb} {b}.") for a in NAMES for b in NAMES for verb in "xy"]
SMALL = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 32, "num_layers": 1}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(SIZES, "tiny", SMALL)
    return build_folder(tmp_path, [text for pair in PAIRS for text in pair], "tiny", 30)


def pretrain(built: Path, **options) -> Path:
    given = {"steps": 3, "max_source": 16, "max_target": 16, "device": torch.device("cpu")}
    return pretrained_folder(built, **{"pairs": PAIRS} | given | options)


def test_parts_of_random_sequences_come_in_another_order():
    copying = Copying(vocabulary=50, end=1, first=3)
    data = copying.data(200)
    first = copying(data.batch(torch.arange(200)).input, generator())
    parts, moved = (
        first[name][:, :-1].view(200, PARTS, LENGTH).tolist() for name in ("ids", "labels")
    )
    assert [sorted(one) for one in moved] == [sorted(one) for one in parts]
    assert 0.7 < sum(a != b for a, b in zip(parts, moved, strict=True)) / 200 < 0.95  # 5 of 6
    assert (first["ids"][:, -1] == 1).all() and (first["labels"][:, -1] == 1).all()
    assert first["ids"][:, :-1].min() == len(SPECIAL) and first["ids"].max() == 49
    second = copying(first, generator(1))
    assert not torch.equal(first["ids"], second["ids"])
    assert torch.equal(copying(first, generator())["ids"], first["ids"])


def test_tokens_stand_for_others_in_sources_and_labels_alike():
    ids = torch.arange(500)[None]
    labels = torch.cat([ids.flip(1), torch.full((1, 3), IGNORED)], 1)
    kept = set()
    for seed in range(40):
        found = Renaming(500, 3)({"ids": ids, "labels": labels}, generator(seed))
        names = found["ids"][0]
        assert names.sort().values.tolist() == list(range(500))
        assert names[: len(SPECIAL)].tolist() == list(range(len(SPECIAL)))
        assert torch.equal(found["labels"][0, :500], names.flip(0))
        assert (found["labels"][0, 500:] == IGNORED).all()
        kept.add(min(KEPT, key=lambda share: abs(share - (names == ids[0]).float().mean())))
    assert kept == set(KEPT)


def test_it_learns_from_the_pairs_and_the_folder_is_found_again(built):
    one, more = pretrain(built), pretrain(built, steps=150)
    assert one != more and {one.parent, more.parent} == {built.parent}
    written = (more / "model.safetensors").stat().st_mtime_ns
    assert pretrain(built, steps=150) == more
    assert (more / "model.safetensors").stat().st_mtime_ns == written
    assert pretrain(built, max_source=8) != one
    copier = pretrain(built, pairs=[])
    assert copier != one and pretrain(built, pairs=PAIRS[:9]) not in (one, copier)
    assert len(list(built.parent.glob("*-copy-*/chain-0"))) == 2  # whatever it says afterwards
    assert not list(built.parent.glob("*-say-*/chain-0"))
    losses = []
    for folder in (one, more):
        network = Seq2Seq(folder, pretrained=True)
        pieces = Pieces(folder, 16, 16)
        tokens = pieces.pad(
            pieces.source([source for source, _ in PAIRS]), pieces.target([t for _, t in PAIRS])
        )
        with torch.no_grad():
            losses.append(-network(tokens).sum() / (tokens["labels"] != IGNORED).sum())
    assert losses[1] < 0.7 * losses[0], losses


def test_what_was_stopped_goes_on(built, tmp_path, monkeypatch):
    wanted = pretrain(built, steps=6)
    weights = (wanted / "model.safetensors").read_bytes()
    for path in built.parent.iterdir():
        if path != built and path.is_dir():
            shutil.rmtree(path)
    step, taken = fitting.PreconditionedSGLD.step, []

    def stopping(kernel):
        taken.append(1)
        if len(taken) in (4, 9):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(kernel)

    monkeypatch.setattr(fitting.PreconditionedSGLD, "step", stopping)
    for _ in range(2):
        with pytest.raises(Stopped):
            pretrain(built, steps=6)
    assert pretrain(built, steps=6) == wanted
    assert len(taken) == 12  # none of them twice
    assert (wanted / "model.safetensors").read_bytes() == weights


def test_a_folder_without_its_weights_is_refused(built):
    folder = pretrain(built)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="lacks its weights: remove it"):
        pretrain(built)


def test_of_runs_that_want_a_model_at_once_one_makes_it(tmp_path):
    folder, began = tmp_path / "model", []
    second = threading.Thread(target=lambda: found.append(made_once(folder, make)))
    found = []

    def make():
        began.append(1)
        if len(began) == 1:
            second.start()
            second.join(0.3)  # the other run asks while this one is at work
        folder.mkdir()
        (folder / "model.safetensors").touch()

    assert made_once(folder, make) == folder
    second.join()
    assert found == [folder]
    assert len(began) == 1
