"""Token ids of sequence-to-sequence models: made tokenizers, padding, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BartConfig, PreTrainedTokenizerFast, T5Config

from bads_ppl.errors import InputError
from models import seq2seq_tokens
from models.language import IGNORED
from models.pretrained import read_config
from models.seq2seq_tokens import Pieces, build_folder, train_tokenizer

NAMES = ("Aarhus Airport", "Café Zoë", "José Martí", "the 11th Mississippi", "Alan Bean")
TEXTS = [
    f"{a} {verb} {b}."
    for a in NAMES
    for b in NAMES
    for verb in ("is near", "was built by", "lies north of")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_folder(tmp_path_factory.mktemp("cache"), TEXTS, "tiny", 60)


@pytest.fixture(scope="module")
def pieces(folder: Path) -> Pieces:
    return Pieces(folder, 16, 8)


@pytest.fixture
def changed(folder, tmp_path):
    """The built folder with another config.json or other words in tokenizer_config.json."""

    def change(config=None, **words) -> Path:
        shutil.copytree(folder, tmp_path / "changed")
        if config is not None:
            (tmp_path / "changed/config.json").write_text(config.to_json_string())
        about = tmp_path / "changed/tokenizer_config.json"
        about.write_text(json.dumps(json.loads(about.read_text()) | words))
        return tmp_path / "changed"

    return change


# -------------------------------------------------------------------------- made of the texts


def test_the_same_texts_make_the_same_tokenizer_and_others_another_folder(folder, tmp_path):
    again = build_folder(tmp_path, TEXTS, "tiny", 60)
    assert (again / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert again.name == folder.name
    others = {
        build_folder(tmp_path, ["Alan Bean", *TEXTS[1:]], "tiny", 60),
        build_folder(tmp_path, TEXTS, "small", 60),
        build_folder(tmp_path, TEXTS, "tiny", 61),
    }
    assert len(others | {again}) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in others | {again}
    )


def test_a_folder_that_is_there_is_taken_and_one_that_failed_leaves_nothing(tmp_path, monkeypatch):
    first = build_folder(tmp_path, TEXTS, "tiny", 60)

    def fail(*args):
        raise RuntimeError("trained again")

    monkeypatch.setattr(seq2seq_tokens, "train_tokenizer", fail)
    assert build_folder(tmp_path, TEXTS, "tiny", 60) == first
    with pytest.raises(RuntimeError):
        build_folder(tmp_path, TEXTS, "tiny", 99)
    assert list(tmp_path.iterdir()) == [first]


def test_of_two_runs_that_make_the_same_folder_the_first_stands(folder, tmp_path, monkeypatch):
    own = seq2seq_tokens._write_config

    def meanwhile(temporary, size):
        own(temporary, size)
        shutil.copytree(folder, tmp_path / folder.name)
        (tmp_path / folder.name / "first").touch()

    monkeypatch.setattr(seq2seq_tokens, "_write_config", meanwhile)
    made = build_folder(tmp_path, TEXTS, "tiny", 60)
    assert list(tmp_path.iterdir()) == [made] and (made / "first").exists()


def test_texts_come_back_as_they_were_but_for_spaces_and_forms_of_letters(folder, pieces):
    texts = ["  Café   Zoë is near\tAlan Bean. ", "ﬁ"]  # the second: one letter for fi
    ids = pieces.target(texts)
    assert all(row[-1] == 1 and 2 not in row for row in ids)
    found = Pieces(folder, 99, 99).pad(ids, ids)["labels"]
    assert pieces.text(found) == ["Café Zoë is near Alan Bean.", "fi"]
    assert 2 in pieces.target(["Ж"])[0]


def test_special_tokens_are_those_of_t5(folder, pieces):
    assert (pieces.padding, pieces.end, pieces.start) == (0, 1, 0)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]
    assert loaded("Alan Bean")["input_ids"] == pieces.source(["Alan Bean"])[0]


def test_a_vocabulary_is_what_the_texts_support_and_no_less_than_their_characters(tmp_path):
    many = build_folder(tmp_path, TEXTS, "tiny", 100_000)
    tokens = read_config(many).vocab_size
    assert tokens == len(AutoTokenizer.from_pretrained(many)) and 60 < tokens < 1000
    with pytest.raises(InputError, match=r"vocabulary must be at least \d+, .* got 20") as error:
        build_folder(tmp_path, TEXTS, "tiny", 20)
    least = int(str(error.value).split("at least ")[1].split(",")[0])
    assert read_config(build_folder(tmp_path, TEXTS, "tiny", least)).vocab_size == least
    with pytest.raises(InputError, match="needs texts"):
        train_tokenizer(["", " "], 100, tmp_path)
    with pytest.raises(InputError, match=r"\['small', 'tiny'\], got 'huge'"):
        build_folder(tmp_path, TEXTS, "huge", 100)


def test_built_models_have_the_sizes_that_they_are_called_by(folder, tmp_path):
    tiny = read_config(folder)
    small = read_config(build_folder(tmp_path, TEXTS, "small", 60))
    for config, size in ((tiny, (128, 32, 4, 512, 2, 2)), (small, (512, 64, 8, 2048, 6, 6))):
        found = (config.d_model, config.d_kv, config.num_heads, config.d_ff)
        assert (*found, config.num_layers, config.num_decoder_layers) == size


# ------------------------------------------------------------------------------------ token ids


def test_pairs_are_padded_to_the_longest_and_labels_where_there_is_no_token(pieces):
    tensors = pieces.pad([[5, 6, 1], [7, 1]], [[8, 1], [9, 10, 11, 1]])
    assert tensors["ids"].tolist() == [[5, 6, 1], [7, 1, 0]]
    assert tensors["mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert tensors["labels"].tolist() == [[8, 1, IGNORED, IGNORED], [9, 10, 11, 1]]
    with pytest.raises(InputError, match="got 2 sources and 1 targets"):
        pieces.pad([[1], [1]], [[1]])


def test_what_is_too_long_is_cut_when_padded_and_keeps_its_end(pieces):
    (ids,) = pieces.source([" ".join(TEXTS[:3])])
    assert len(ids) > 16
    tensors = pieces.pad([ids, [5, 1]], [ids, [5, 1]])
    assert tensors["ids"][0].tolist() == [*ids[:15], 1]
    assert tensors["mask"].sum(1).tolist() == [16, 2]
    assert tensors["labels"][0].tolist() == [*ids[:7], 1]


@pytest.mark.parametrize("lengths", [(1, 8), (8, 1)])
def test_lengths_without_room_for_a_token_are_refused(lengths, folder):
    with pytest.raises(InputError, match=r"max_(source|target) must be at least 2 .* got 1"):
        Pieces(folder, *lengths)


def test_lengths_beyond_a_model_s_positions_are_refused(changed):
    own = changed(BartConfig(vocab_size=200, max_position_embeddings=12, eos_token_id=1))
    assert Pieces(own, 12, 12).start == 2
    with pytest.raises(InputError, match=r"max_target must be .* at most 12 .* got 13"):
        Pieces(own, 12, 13)


def test_a_tokenizer_of_another_model_is_refused_with_both_numbers(changed, folder):
    tokens = len(AutoTokenizer.from_pretrained(folder))
    own = changed(T5Config(vocab_size=tokens - 1, decoder_start_token_id=0))
    with pytest.raises(InputError, match=rf"knows {tokens} tokens .* vocab_size {tokens - 1}"):
        Pieces(own, 8, 8)


def test_a_tokenizer_that_ends_otherwise_than_the_model_is_refused(changed):
    own = changed(T5Config(vocab_size=200, decoder_start_token_id=0, eos_token_id=7))
    with pytest.raises(InputError, match=r"has id 1 in its tokenizer and eos_token_id 7 in its"):
        Pieces(own, 8, 8)
    several = T5Config(vocab_size=200, decoder_start_token_id=0, eos_token_id=[7, 8])
    (own / "config.json").write_text(several.to_json_string())
    assert Pieces(own, 8, 8).end == 1


@pytest.mark.parametrize(("token", "name"), [("pad_token", "padding"), ("eos_token", "end")])
def test_a_tokenizer_without_padding_or_end_is_refused(token, name, changed):
    own = changed(**{token: None})
    with pytest.raises(InputError, match=f"has no {name} token"):
        Pieces(own, 8, 8)


def test_a_model_whose_decoder_starts_nowhere_is_refused(changed):
    with pytest.raises(InputError, match="has no decoder_start_token_id"):
        Pieces(changed(T5Config(vocab_size=200)), 8, 8)


def test_an_end_is_added_where_a_tokenizer_adds_none(folder, tmp_path, pieces):
    shutil.copytree(folder, tmp_path / "own")
    path = tmp_path / "own/tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    bare = PreTrainedTokenizerFast.from_pretrained(tmp_path / "own")
    assert bare("Alan Bean")["input_ids"][-1] != 1
    own = Pieces(tmp_path / "own", 8, 8)
    assert own.source(["Alan Bean", ""]) == pieces.source(["Alan Bean", ""])
    assert torch.equal(
        own.pad(own.source(["Alan"]), own.target(["Bean"]))["labels"],
        pieces.pad(pieces.source(["Alan"]), pieces.target(["Bean"]))["labels"],
    )
