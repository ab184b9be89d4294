"""Pretrained encoders: tokens, masks, dropout, what is trained, what is refused."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from bads_ppl.errors import InputError
from models import encoder as encoders
from models.encoder import Encoder, Tokenizer, embed
from models.pretrained import MINILM, PACKAGES, find_model, width
from models.text_classifier import TextClassifier

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGES[MINILM]) is None,
    reason="MiniLM's package is not installed (bads-ppl[text])",
)

TEXTS = [
    "A cat sleeps.",
    "The kitten is asleep on the sofa, and nothing in the whole wide world will wake it up.",
    "Interest rates rose.",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return find_model(MINILM)


@pytest.fixture(scope="module")
def minilm(folder: Path) -> Encoder:
    return Encoder(folder)


# ------------------------------------------------------------------------------------------ tokens


def test_longer_texts_are_cut_and_still_end_as_the_encoder_expects(folder):
    few, many = Tokenizer(folder, 8), Tokenizer(folder, 128)
    short, long = few(TEXTS)[:2]
    assert few.counts(TEXTS).tolist() == [len(ids) for ids in many(TEXTS)]
    assert len(long) == 8 < few.counts(TEXTS)[1]
    assert short[-1] == long[-1] and long[:7] == many(TEXTS)[1][:7]


@pytest.mark.parametrize("wrong", [2, 513])
def test_a_length_that_the_encoder_does_not_take_is_refused(wrong, folder):
    with pytest.raises(InputError, match=rf"max_tokens must be from 3 to 512 .* got {wrong}"):
        Tokenizer(folder, wrong)


# ------------------------------------------------------------------------------------------ states


def test_padding_never_leaks_into_the_states_whatever_it_holds(folder, minilm):
    tokenizer = Tokenizer(folder, 32)
    tokens = tokenizer.pad(tokenizer(TEXTS), 32)
    garbage = torch.where(tokens["mask"] == 1, tokens["ids"], torch.tensor(7000))
    with torch.no_grad():
        together = minilm(tokens)
        spoilt = minilm({"ids": garbage, "mask": tokens["mask"]})
        for row, text in enumerate(TEXTS):
            alone = torch.tensor(tokenizer([text]))
            states = minilm.model(input_ids=alone).last_hidden_state
            assert torch.allclose(states.mean(1)[0], together[row], atol=1e-5)
    assert torch.allclose(together, spoilt, atol=1e-5)


def test_texts_of_like_meaning_have_like_states_in_the_order_of_the_texts(
    folder, minilm, monkeypatch
):
    monkeypatch.setattr(encoders, "PASS", 2)
    states = torch.nn.functional.normalize(embed(TEXTS, Tokenizer(folder, 32), minilm))
    assert states.shape == (3, width(folder)) == (3, 384)
    assert states[0] @ states[1] > 0.5 > 0.3 > states[0] @ states[2]


def test_many_texts_without_gradients_go_through_in_passes_with_the_same_states(
    folder, minilm, monkeypatch
):
    tokenizer = Tokenizer(folder, 32)
    tokens = tokenizer.pad(tokenizer(TEXTS), 32)
    with torch.no_grad():
        whole = minilm(tokens)
        monkeypatch.setattr(encoders, "PASS", 2)
        assert torch.allclose(minilm(tokens), whole, atol=1e-5)


@pytest.fixture
def t5(tmp_path) -> Path:
    size = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    with torch.random.fork_rng():
        T5ForConditionalGeneration(T5Config(vocab_size=20, **size)).save_pretrained(tmp_path)
    return tmp_path


def test_of_an_encoder_decoder_the_encoder_is_taken(t5):
    ids = torch.tensor([[3, 4, 5]])
    assert Encoder(find_model(str(t5)))({"ids": ids, "mask": ids > 0}).shape == (1, 16)


def without(folder: Path, target: Path, part: str) -> Path:
    """A copy of a model without the weights whose names hold `part`."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    kept = {name: value for name, value in weights.items() if part not in name}
    assert len(kept) < len(weights)
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    return target


def test_an_encoder_that_lacks_weights_which_are_used_is_refused(folder, t5, tmp_path):
    with pytest.raises(InputError, match=r"lacks the weights of 16 parameters.*layer\.3\."):
        Encoder(without(folder, tmp_path / "layer", ".layer.3."))
    with pytest.raises(InputError, match=r"lacks the weights of 9 parameters.*encoder\.block"):
        Encoder(without(t5, tmp_path / "block", "encoder.block.0"))
    Encoder(without(folder, tmp_path / "pooler", "pooler."))
    Encoder(without(t5, tmp_path / "decoder", "decoder."))


# -------------------------------------------------------------------------------------- classifier


@pytest.fixture(scope="module")
def tokens(folder: Path) -> dict[str, torch.Tensor]:
    tokenizer = Tokenizer(folder, 24)
    return tokenizer.pad(tokenizer(TEXTS), 24)


def test_of_a_frozen_encoder_the_network_is_the_head_alone():
    net = TextClassifier(5, hidden=7)
    assert {name.split(".")[0] for name, _ in net.named_parameters()} == {"head"}
    states = torch.randn(4, 384)
    assert net(states).shape == (4, 5)
    assert torch.allclose(net(states), net(10 * states + 3), atol=1e-4)  # scale plays no part
    assert TextClassifier(5, hidden=0).head[0].weight.shape == (5, 384)


@pytest.mark.parametrize(
    ("tune", "trained"), [("full", 22_565_376), ("lora", 6 * 8 * (4 * 768 + 2 * 1920))]
)
def test_gradients_reach_what_is_tuned_and_nothing_else(tune, trained, tokens):
    net = TextClassifier(2, tune=tune, hidden=0).train()
    moved = {name for name, p in net.encoder.named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in net.encoder.parameters() if p.requires_grad)
    net(tokens).logsumexp(1).sum().backward()
    reached = {name for name, p in net.encoder.named_parameters() if p.grad is not None}
    assert moved == reached and count == trained
    assert all(("lora" in name) == (tune == "lora") for name in moved)


def test_dropout_stays_off_in_training_so_that_two_passes_agree(tokens):
    net = TextClassifier(2, tune="full").train()
    assert net.training and torch.equal(net(tokens), net(tokens))


def test_an_untrained_low_rank_change_changes_nothing(tokens, minilm):
    net = TextClassifier(2, tune="lora")
    with torch.no_grad():
        assert torch.allclose(net.encoder(tokens), minilm(tokens), atol=1e-5)


def test_lora_without_peft_and_impossible_sizes_are_refused(monkeypatch):
    with pytest.raises(InputError, match="hidden must be at least 0 units, got -1"):
        TextClassifier(2, hidden=-1)
    with pytest.raises(InputError, match="rank must be at least 1, got 0"):
        TextClassifier(2, tune="lora", rank=0)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(InputError, match=r"tune=lora needs the package peft"):
        TextClassifier(2, tune="lora")
