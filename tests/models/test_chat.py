"""Conversations as token ids: what counts, templates, what is cut, what is refused."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from bads_ppl.errors import InputError
from models import chat as chats
from models.chat import TEMPLATE, Chat, Encoded, build_folder, train_tokenizer
from models.language import IGNORED
from models.pretrained import read_config

TEXTS = [f"What is {a} plus {b}? It is {a + b}, José." for a in range(12) for b in range(9)]
ONE = (("user", "What is 3 plus 4?"), ("assistant", "It is 7."))
TWO = (
    ("system", "Be José."),
    *ONE,
    ("user", " And 8 plus 8? "),
    ("assistant", "16,\n\n I say."),
)

CHATML = (
    "{% for m in messages %}{{ '<|user|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)
INSTRUCT = (  # as Llama 2 and Mistral
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content | trim + ' <|end|>' }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
CLOSED = TEMPLATE.replace("{% if", "{% if not add_generation_prompt %}<|padding|>{% endif %}{% if")
ENDLESS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
ENDLESS += "{% if add_generation_prompt %}assistant: {% endif %}"  # its space joins the answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_folder(tmp_path_factory.mktemp("cache"), TEXTS, "tiny", 330)


@pytest.fixture
def changed(folder, tmp_path):
    """The built folder with other words in tokenizer_config.json or config.json."""

    def change(config=(), **words) -> Path:
        own = tmp_path / "changed"
        shutil.copytree(folder, own)
        for name, new in (("tokenizer_config.json", words), ("config.json", dict(config))):
            about = json.loads((own / name).read_text()) | new
            (own / name).write_text(json.dumps(about))
        return own

    return change


def said(folder: Path, encoded: Encoded) -> list[list[str]]:
    """The texts of each run of labels of each conversation."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for labels in encoded.labels:
        runs, before = [], IGNORED
        for label in labels:
            if label != IGNORED:
                runs += [[]] if before == IGNORED else []
                runs[-1].append(label)
            before = label
        found.append([tokenizer.decode(run, skip_special_tokens=False) for run in runs])
    return found


# -------------------------------------------------------------------------- made of the texts


def test_the_same_texts_make_the_same_folder_once_and_others_another(folder, tmp_path, monkeypatch):
    again = build_folder(tmp_path, TEXTS, "tiny", 330)
    files = {path.name: path.read_bytes() for path in again.iterdir()}
    assert again.name == folder.name
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(files) == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    others = {
        build_folder(tmp_path, ["Alan Bean", *TEXTS[1:]], "tiny", 330),
        build_folder(tmp_path, TEXTS, "small", 330),
        build_folder(tmp_path, TEXTS, "tiny", 331),
    }
    assert len(others | {again}) == 4 == len(list(tmp_path.iterdir()))
    monkeypatch.setattr(chats, "train_tokenizer", None)
    assert build_folder(tmp_path, TEXTS, "tiny", 330) == again


def test_a_tiny_model_has_about_a_million_parameters(tmp_path):
    from transformers import AutoModelForCausalLM

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(900)]
    config = read_config(build_folder(tmp_path, [" ".join(words)] * 2, "tiny", 2000))
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (128, 4, 2000)
    count = sum(value.numel() for value in AutoModelForCausalLM.from_config(config).parameters())
    assert 0.95e6 < count < 1.1e6


def test_any_text_comes_back_as_it_was(folder):
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(folder)
    for text in ("  José \n\tis\r\n 7. ", "日本語 🙂 ﬁ", "<|user |> no token"):
        ids = raw.encode(text).ids
        assert raw.decode(ids) == text == loaded.decode(ids) and loaded(text)["input_ids"] == ids
        assert min(ids) >= len(chats.SPECIAL)
    assert loaded.convert_ids_to_tokens(range(5)) == list(chats.SPECIAL)
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)


def test_a_vocabulary_holds_all_bytes_and_what_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"at least 261, .* 256 bytes, got 260"):
        build_folder(tmp_path, TEXTS, "tiny", 260)
    assert not list(tmp_path.iterdir())
    assert read_config(build_folder(tmp_path, TEXTS, "tiny", 261)).vocab_size == 261
    with pytest.raises(InputError, match="needs texts"):
        train_tokenizer(["", " "], 300, tmp_path)
    with pytest.raises(InputError, match=r"\['small', 'tiny'\], got 'huge'"):
        build_folder(tmp_path, TEXTS, "huge", 300)


# --------------------------------------------------------------------------------- what counts


def test_ids_are_those_of_the_template_and_responses_with_their_ends_count(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = Chat(folder, 100).encode([ONE, TWO])
    assert said(folder, encoded) == [
        ["It is 7.<|end|>"],
        ["It is 7.<|end|>", "16,\n\n I say.<|end|>"],
    ]
    for conversation, ids, labels in zip((ONE, TWO), encoded.ids, encoded.labels, strict=True):
        messages = [{"role": role, "content": content} for role, content in conversation]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer(whole, add_special_tokens=False)["input_ids"] == ids
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        shown = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert ids[: len(shown)] == shown and labels[len(shown) - 1] == IGNORED
        assert labels[len(shown) :] == ids[len(shown) :]
        assert all(label in (IGNORED, id) for label, id in zip(labels, ids, strict=True))
    assert encoded.cut == encoded.headless == []


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["It is 7.<|end|>", "16,\n\n I say.<|end|>"]),  # and no line break behind it
        (INSTRUCT, [" It is 7. <|end|>", " 16,\n\n I say. <|end|>"]),
        (CLOSED, ["It is 7.<|end|>", "16,\n\n I say.<|end|>"]),  # and not the last token of all
    ],
    ids=["chatml", "instruct", "closed"],
)
def test_responses_are_found_in_templates_of_several_kinds(template, expected, changed):
    own = changed(chat_template=template)
    encoded = Chat(own, 200).encode([TWO])
    assert said(own, encoded) == [expected]
    tokenizer = AutoTokenizer.from_pretrained(own)
    messages = [{"role": role, "content": content} for role, content in TWO]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert encoded.ids == [tokenizer(whole, add_special_tokens=False)["input_ids"]]


def test_a_response_is_tokens_of_its_own_where_one_would_span_its_start(changed):
    own = changed(chat_template=ENDLESS)
    tokenizer = AutoTokenizer.from_pretrained(own)
    encoded = Chat(own, 200).encode([ONE])
    (ids,), (labels,) = encoded.ids, encoded.labels
    prompt = tokenizer("user: What is 3 plus 4?\nassistant: ")["input_ids"]
    whole = "user: What is 3 plus 4?\nassistant: It is 7.\n"
    together = tokenizer(whole)["input_ids"]
    assert together[: len(prompt)] != prompt  # " It" is one token
    assert ids == prompt + tokenizer("It is 7.\n")["input_ids"] and tokenizer.decode(ids) == whole
    assert labels == [IGNORED] * len(prompt) + ids[len(prompt) :]


def test_special_tokens_in_a_message_end_nothing_but_what_they_stand_behind(folder):
    own = (("user", "Say <|end|>"), ("assistant", "<|end|> is it, José"))
    encoded = Chat(folder, 100).encode([own, (ONE[0], ("assistant", ""))])
    assert said(folder, encoded) == [["<|end|> is it, José<|end|>"], ["<|end|>"]]


@pytest.mark.parametrize("begins", [False, True])
def test_a_tokenizer_without_template_gets_a_plain_one(begins, changed):
    own = changed(chat_template=None, bos_token="<|system|>")
    if begins:
        path = own / "tokenizer.json"
        raw = Tokenizer.from_file(str(path))
        raw.post_processor = processors.TemplateProcessing(
            single="<|system|> $A", special_tokens=[("<|system|>", 2)]
        )
        raw.save(str(path))
    encoded = Chat(own, 200).encode([TWO])
    assert said(own, encoded) == [[" It is 7.<|end|>", " 16,\n\n I say.<|end|>"]]
    text = AutoTokenizer.from_pretrained(own).decode(encoded.ids[0], skip_special_tokens=False)
    assert text == "<|system|>" * begins + (
        "System: Be José.\nUser: What is 3 plus 4?\nAssistant: It is 7.<|end|>"
        "User:  And 8 plus 8? \nAssistant: 16,\n\n I say.<|end|>"
    )


# ------------------------------------------------------------------------------ cut and padded


def test_what_is_beyond_the_length_is_cut_and_told(folder):
    long = (("user", "Why?"), ("assistant", "It is 7, as I would say to whoever asks me for it."))
    whole = Chat(folder, 200).encode([ONE, long])
    length = len(whole.ids[1])
    exact, short = (Chat(folder, k).encode([ONE, long]) for k in (length, length - 1))
    assert (exact.ids, exact.labels, exact.cut) == (whole.ids, whole.labels, [])
    assert (short.ids[1], short.labels[1]) == (whole.ids[1][:-1], whole.labels[1][:-1])
    assert (short.ids[0], short.cut, short.headless) == (whole.ids[0], [1], [])


def test_of_a_long_prompt_the_end_is_shown_and_at_least_half_are_responses_if_there_are_as_many(
    folder,
):
    words = "What is 3 plus 4? " * 9
    for reply in ("7", "It is 7, I would say, and I am as sure of it as one can be of a sum."):
        one = (("user", words), ("assistant", reply))
        whole = Chat(folder, 400).encode([one])
        (ids,), (labels,) = whole.ids, whole.labels
        prompt, said = labels.count(IGNORED), len(ids) - labels.count(IGNORED)
        for most in (2, 3, 14, 20, prompt, prompt + 1, len(ids) - 1):
            found = Chat(folder, most).encode([one])
            shown = max(min(said, most // 2), most - prompt)
            assert found.ids == [ids[prompt - (most - shown) : prompt + shown]]
            assert found.labels == [labels[prompt - (most - shown) : prompt + shown]]
            assert found.cut == [0] and found.headless == [0] * (most - shown < prompt)


def test_the_token_that_conversations_begin_with_stays(changed):
    template = "{{ bos_token }}" + TEMPLATE
    begun = changed(bos_token="<|system|>", chat_template=template)
    one = (("user", "What is 3 plus 4? " * 9), ("assistant", "7"))
    (ids,), (short,) = (Chat(begun, k).encode([one]).ids for k in (400, 14))
    assert short == [2, *ids[-13:]] and ids[0] == 2


def test_there_must_be_something_to_pad_and_to_learn(folder, changed):
    with pytest.raises(InputError, match="no conversations to pad"):
        Chat(folder, 14).pad(Encoded([], [], [], []))
    silent = changed(chat_template="{{ messages[0]['content'] }}")
    with pytest.raises(InputError, match=r"response of conversation 1 has no token.*leave it out"):
        Chat(silent, 14).encode([ONE])


@pytest.mark.parametrize(("token", "filler"), [("<|padding|>", 0), (None, 1)])
def test_rows_are_padded_on_the_right_with_the_end_where_there_is_no_padding(
    token, filler, changed
):
    chat = Chat(changed(pad_token=token), 200)
    assert chat.padding == filler
    encoded = chat.encode([ONE, TWO])
    tensors = chat.pad(encoded)
    short, long = map(len, encoded.ids)
    gap = long - short
    assert tensors["ids"].tolist() == [encoded.ids[0] + [filler] * gap, encoded.ids[1]]
    assert tensors["mask"].tolist() == [[1] * short + [0] * gap, [1] * long]
    assert tensors["labels"].tolist() == [encoded.labels[0] + [IGNORED] * gap, encoded.labels[1]]
    assert tensors["labels"][0, short - 1] == 1  # the end still counts


# ----------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("template", "where"),
    [
        ("{{ messages | length }}" + TEMPLATE, "message 2 of conversation 1"),
        ("{% set messages = messages[-2:] %}" + TEMPLATE, "message 3 of conversation 2"),
        (
            TEMPLATE.replace("'<|end|>'", "('<|end|>' if loop.last or loop.length < 4 else '')"),
            "message 3 of conversation 2",
        ),
    ],
    ids=["counted", "forgotten", "only the last ends"],
)
def test_a_template_whose_prompts_are_not_the_beginning_of_the_whole_is_refused(
    template, where, changed
):
    chat = Chat(changed(chat_template=template), 200)
    with pytest.raises(InputError, match=f"{where} out differently"):
        chat.encode([ONE, TWO])


def test_a_template_that_takes_no_such_role_is_refused_with_its_reason(changed):
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    chat = Chat(changed(chat_template=refuse + TEMPLATE), 200)
    assert len(chat.encode([ONE])) == 1
    with pytest.raises(InputError, match=r"conversation 2, of roles \['system', .*no system"):
        chat.encode([ONE, TWO])


@pytest.mark.parametrize("wrong", [(), ONE[:1], ONE[1:]])
def test_a_conversation_has_a_prompt_and_ends_with_a_response(wrong, folder):
    with pytest.raises(InputError, match=r"conversation 2 must begin .* and end .* got roles"):
        Chat(folder, 100).encode([ONE, wrong])


def test_lengths_that_a_model_does_not_take_are_refused(folder, changed):
    for wrong in (1, chats.POSITIONS + 1):
        with pytest.raises(InputError, match=rf"from 2 to {chats.POSITIONS} .* got {wrong}"):
            Chat(folder, wrong)
    own = changed(model_max_length=50)
    assert Chat(own, 50).vocabulary == read_config(folder).vocab_size
    with pytest.raises(InputError, match="from 2 to 50 "):
        Chat(own, 51)


def test_a_tokenizer_without_an_end_or_of_another_model_is_refused(folder, changed, tmp_path):
    tokens = len(AutoTokenizer.from_pretrained(folder))
    own = changed({"vocab_size": tokens - 1})
    with pytest.raises(InputError, match=rf"knows {tokens} tokens .* vocab_size {tokens - 1}"):
        Chat(own, 9)
    shutil.rmtree(own)
    with pytest.raises(InputError, match="has no end token"):
        Chat(changed(eos_token=None), 9)
