"""A small causal model that is trained on the spot: that it learns, and where it is kept."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from bads_ppl.errors import InputError, Stopped
from inference import fitting
from inference.causal_pretraining import pretrained_causal
from inference.copying import LENGTH, PARTS, SEQUENCES, Repeating
from inference.instructions import Conversation, Message
from models.causal import Causal
from models.chat import SIZES, Chat, build_folder
from models.language import IGNORED, token_loss

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip
TALKS: list[Conversation] = [
    (Message("user", f"Say {word} {k} times"), Message("assistant", " ".join([word] * k)))
    for word in ("left", "right", "up")
    for k in range(1, 6)
]


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(SIZES, "tiny", SMALL)
    return build_folder(tmp_path, [said for one in TALKS for _, said in one], "tiny", 290)


def pretrain(built: Path, conversations=TALKS, **options) -> Path:
    given = {"steps": 3, "max_tokens": 32, "device": torch.device("cpu")}
    return pretrained_causal(built, conversations, **given | options)


def loss(folder: Path) -> float:
    """Of the responses, which is a part of what it has learned."""
    chat = Chat(folder, 32)
    tokens = chat.pad(chat.encode(TALKS))
    with torch.no_grad():
        output = Causal(folder, pretrained=True)(tokens)
    return float(token_loss(output, tokens["labels"]).mean())


def test_it_learns_the_conversations_and_the_folder_is_found_again(built):
    one, more = pretrain(built), pretrain(built, steps=150)
    assert one != more and {one.parent, more.parent} == {built.parent}
    assert loss(more) < loss(one) - 1.0
    written = (more / "model.safetensors").stat().st_mtime_ns
    assert pretrain(built, steps=150) == more
    assert (more / "model.safetensors").stat().st_mtime_ns == written
    others = {pretrain(built, max_tokens=16), pretrain(built, conversations=TALKS[:9]), one}
    assert len(others) == 3
    assert not list(built.parent.glob("llama*-learning-*/chain-0"))


def test_prompts_are_learned_as_well(built, monkeypatch):
    seen = []
    fit = fitting.fit

    def watched(network, loss, data, **options):
        seen.append(data)
        return fit(network, loss, data, **options)

    monkeypatch.setattr("inference.trained_folders.fit", watched)
    pretrain(built)
    copied, data = seen
    ids, labels = copied.input["ids"], copied.target
    assert ids.shape == labels.shape == (SEQUENCES, 2 * PARTS * LENGTH + 1)
    mask = data.input["mask"].bool()
    assert torch.equal(data.target[:, 1:][mask[:, 1:]], data.input["ids"][:, 1:][mask[:, 1:]])
    assert (data.target[:, 0] < 0).all() and (data.target[~mask] < 0).all()


def test_random_parts_are_said_again_in_another_order():
    made = Repeating(vocabulary=50, end=1, first=5)
    data = made.data(100)
    found = made(data.batch(torch.arange(100)).input, torch.Generator().manual_seed(0))
    ids, labels, half = found["ids"], found["labels"], PARTS * LENGTH
    assert (labels[:, :half] == IGNORED).all() and torch.equal(labels[:, half:], ids[:, half:])
    assert torch.equal(ids[:, :half].sort(1).values, ids[:, half:-1].sort(1).values)
    assert not torch.equal(ids[:, :half], ids[:, half:-1])
    assert (ids[:, -1] == 1).all() and ids[:, :-1].min() >= 5


def test_without_conversations_it_learns_to_copy_alone(built):
    one = pretrain(built, conversations=[])
    assert one != pretrain(built) and one == pretrain(built, conversations=[])
    assert (one / "model.safetensors").is_file()


def test_a_stopped_training_goes_on(built, monkeypatch):
    whole = pretrain(built, steps=40)
    wanted = (whole / "model.safetensors").read_bytes()
    shutil.rmtree(whole)
    step, calls = fitting.PreconditionedSGLD.step, []

    def stop(self):
        calls.append(1)
        if len(calls) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(fitting.PreconditionedSGLD, "step", stop)
        with pytest.raises(Stopped):
            pretrain(built, steps=40)
    assert len(calls) < 40 and not whole.exists()
    assert pretrain(built, steps=40) == whole
    assert (whole / "model.safetensors").read_bytes() == wanted


def test_a_folder_without_weights_is_refused(built):
    folder = pretrain(built)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="lacks its weights: remove it"):
        pretrain(built)
