"""Instructions: what each kind of row and file says, what is refused, and the real sources."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bads_ppl.errors import InputError
from inference.instructions import (
    EXAMPLES,
    Conversation,
    Instructions,
    Message,
    find_examples,
    read_instructions,
    repeated,
)

ROOT = Path(os.environ.get("BADS_DATA", "data"))
SIZES = {"dolly": 15_011, "alpaca": 15_000, "flan_cot": 33_443, "oasst1": 953, "gsm8k": 7_473}
USER, ANSWER = Message("user", "Name a fish."), Message("assistant", "Eel.")
ROW = {"prompt": "Name a fish.", "response": "Eel."}


def write(path: Path, *rows: object) -> Path:
    """Rows as JSON lines; text stands as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def saved(folder: Path, *shards: list[dict], **state: object) -> Path:
    """A folder as `datasets.save_to_disk` writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{len(shards):05d}.arrow" for n in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(table, max_chunksize=1)
    whole = {"_data_files": [{"filename": name} for name in names], "_split": None, **state}
    (folder / "state.json").write_text(json.dumps(whole))
    return folder


def read(path: Path, **options) -> Instructions:
    return read_instructions(path, source="mine", **options)


def chat(*said: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in said]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ROW, (USER, ANSWER)),
        ({"instruction": "Name a fish.", "output": "Eel."}, (USER, ANSWER)),
        ({"instruction": "Name a fish.", "input": "", "output": "Eel."}, (USER, ANSWER)),
        (
            {"instruction": "Sum up.", "input": "It rains.", "output": "Rain."},
            (Message("user", "Sum up.\n\nIt rains."), Message("assistant", "Rain.")),
        ),
        (chat(USER, ANSWER, USER, ANSWER), (USER, ANSWER, USER, ANSWER)),
        (chat(("system", "Be brief."), USER, ANSWER), (("system", "Be brief."), USER, ANSWER)),
        (chat(("system", " "), USER, ANSWER), (USER, ANSWER)),
        ({**chat(USER, ANSWER), "prompt": "x", "response": "y"}, (USER, ANSWER)),
        ({**ROW, "messages": None}, (USER, ANSWER)),
        ({**ROW, "prompt": " ### Human: a\n"}, (Message("user", " ### Human: a\n"), ANSWER)),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "set"])
def test_every_kind_of_row_and_file_is_read_as_a_conversation(row, expected, name, tmp_path):
    if name == "set":
        path = saved(tmp_path / name, [row])
    elif name == "x.parquet":
        path = tmp_path / name
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path = write(tmp_path / name, row)
    found = read(path)
    assert found.conversations == [expected] and found.ids == ["0"] and len(found) == 1
    assert isinstance(found.conversations[0][0], Message)
    assert (found.source, found.skipped, found.empty) == ("mine", 0, 0)


@pytest.mark.parametrize("name", ["x.ndjson", "x.jsonl.gz", "x.y.ndjson.gz"])
def test_other_endings_of_json_lines(name, tmp_path):
    assert read(write(tmp_path / name, ROW, "", ROW)).conversations == [(USER, ANSWER)] * 2


def test_ids_are_those_of_the_rows_else_their_numbers(tmp_path):
    rows = [{"id": "a"}, {"message_id": "b", "id": None}, {"id": 7, "message_id": "c"}, {"id": ""}]
    path = write(tmp_path / "x.jsonl", *({**ROW, **row} for row in rows), "{", ROW)
    assert read(path, on_error="skip").ids == ["a", "b", "7", "3", "5"]


def test_an_id_that_two_rows_share_is_refused_with_both_lines(tmp_path):
    path = write(tmp_path / "x.jsonl", {**ROW, "id": 1}, "", {**ROW, "id": "b"}, {**ROW, "id": "1"})
    with pytest.raises(
        InputError, match=r"line 4: the id '1' must be unique .* after .*x\.jsonl, line 1: remove"
    ):
        read(path, on_error="skip")


def test_a_split_is_chosen_by_its_key(tmp_path):
    rows = [{**ROW, "split": split} for split in ("train", "test", "train")]
    path = write(tmp_path / "x.jsonl", *rows)
    assert read(path, split="train").ids == ["0", "2"] and read(path).ids == ["0", "1", "2"]
    with pytest.raises(InputError, match=r"no rows of the split 'dev' with .* \(0 malformed, 0 bl"):
        read(path, split="dev")
    with pytest.raises(InputError, match=r"line 1: expected the key 'split', to choose 'train' by"):
        read(write(tmp_path / "y.jsonl", ROW), split="train")


MALFORMED = [
    ('{"prompt": ', "one JSON object, got: Expecting value"),
    pytest.param("[" * 100_000, "one JSON object, got: maximum recursion", id="deep"),
    ("[1]", r'a JSON object, got list: write an object with the key "messages"'),
    ({"text": "a"}, r'an object with the key "messages" .* got \[\'text\'\]: mend'),
    ({"prompt": "a", "output": "b"}, r".* or \"instruction\" .* got \['prompt', 'output'\]"),
    ({**ROW, "prompt": 3}, "'prompt' to be text, got 3"),
    ({**ROW, "response": ["a"]}, r"'response' to be text, got \['a'\]"),
    ({**ROW, "response": "a \ud800"}, r"'response' to be text that UTF-8 can hold, got '\\ud800'"),
    ({**ROW, "id": 0.5}, "'id' to be a word or a whole number, got 0.5"),
    ({"messages": []}, r"'messages' to be a list of messages, one at least, got \[\]"),
    ({"messages": "hello"}, "'messages' to be a list of messages, .* got 'hello'"),
    (
        {"messages": [{"role": "user"}]},
        r"message 1 to have the keys role and content, got {'role': 'user'}",
    ),
    (
        chat(USER, ("bot", "b")),
        "the role of message 2 to be one of system, user, assistant, got 'bot'",
    ),
    (chat(USER, ANSWER, USER), "'messages' to end with an assistant's, the response, got 'user'"),
    (
        chat(("system", "s"), ANSWER, USER, ANSWER),
        r"a user's message before the first of an assistant, got \['system', 'assistant', 'user'",
    ),
    ({"messages": [{"role": "user", "content": 1}]}, "'content of message 1' to be text, got 1"),
]


@pytest.mark.parametrize(("row", "message"), MALFORMED)
def test_a_malformed_line_is_refused_with_its_number_or_skipped_and_counted(row, message, tmp_path):
    path = write(tmp_path / "x.jsonl", ROW, "", row, ROW)
    with pytest.raises(InputError, match=r"x\.jsonl, line 3: expected " + message):
        read(path)
    found = read(path, on_error="skip")
    assert found.skipped == 1 and found.ids == ["0", "2"]
    with pytest.raises(InputError, match=r"\(1 malformed, 0 blank\).*x\.jsonl, line 1: "):
        read(write(path, row), on_error="skip")


def test_a_line_that_is_no_utf8_is_malformed(tmp_path):
    line = json.dumps(ROW).encode()
    (tmp_path / "x.jsonl").write_bytes(line + b'\n{"prompt": "\xe9"}\n' + line)
    with pytest.raises(InputError, match="line 2: expected UTF-8, got the byte 0xe9"):
        read(tmp_path / "x.jsonl")
    assert read(tmp_path / "x.jsonl", on_error="skip").skipped == 1


@pytest.mark.parametrize(
    "row",
    [
        {**ROW, "response": " \n"},
        {**ROW, "prompt": None},
        {"instruction": "", "input": " ", "output": "a"},
        chat(USER, ("assistant", "")),
        chat(("user", " "), ANSWER),
        chat(USER, ("assistant", " "), USER, ANSWER),
        chat(ANSWER),
        chat(("system", "Be brief."), ANSWER),
    ],
)
def test_a_blank_prompt_or_response_is_refused_or_dropped_and_counted(row, tmp_path):
    path = write(tmp_path / "x.jsonl", ROW, row, row, ROW)
    with pytest.raises(InputError, match=r"line 2: the prompt or the response .* in 2 of 4 rows"):
        read(path, on_error="skip")
    found = read(path, empty="drop")
    assert (found.empty, found.skipped, found.ids) == (2, 0, ["0", "3"])
    with pytest.raises(InputError, match=r"has no rows with .* \(0 malformed, 1 blank\)"):
        read(write(path, row), empty="drop")


def test_files_that_are_missing_damaged_or_of_another_kind(tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*x\.jsonl: name the file of instruct"):
        read(tmp_path / "x.jsonl")
    with pytest.raises(InputError, match=r"must end in .jsonl, .ndjson, .parquet .* got '.csv'"):
        read(write(tmp_path / "x.csv", ROW))
    whole = write(tmp_path / "x.jsonl.gz", *({**ROW, "id": n} for n in range(999))).read_bytes()
    (tmp_path / "x.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(InputError, match="expected a whole gzip file"):
        read(tmp_path / "x.jsonl.gz", on_error="skip")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        read(tmp_path / "x.parquet")
    pq.write_table(pa.table({"prompt": ["a"], "response": [1]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet, row 0: expected 'response' to be text"):
        read(tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.jsonl has no rows with a prompt and a response"):
        read(write(tmp_path / "x.jsonl"))


def test_options_have_two_values(tmp_path):
    path = write(tmp_path / "x.jsonl", ROW)
    with pytest.raises(InputError, match="on_error must be refuse or skip, got 'drop'"):
        read(path, on_error="drop")
    with pytest.raises(InputError, match="empty must be refuse or drop, got 'skip'"):
        read(path, empty="skip")


def test_a_saved_set_may_have_several_files_and_a_split_of_its_own(tmp_path):
    one, two = {**ROW, "id": "a"}, {**ROW, "id": "b"}
    folder = saved(tmp_path / "set", [one, two], [{**ROW, "id": "c"}], _split="train")
    assert read(folder).ids == read(folder, split="train").ids == ["a", "b", "c"]
    with pytest.raises(InputError, match=r"set, row 0: expected the key 'split', to choose 'test'"):
        read(folder, split="test")
    again = saved(tmp_path / "again", [one], [two, one])
    with pytest.raises(InputError, match=r"again, row 2: the id 'a' .* after .*again, row 0"):
        read(again)


def test_a_saved_dictionary_of_splits_is_read_by_the_name_of_one(tmp_path):
    for split in ("train", "test"):
        saved(tmp_path / "all" / split, [{**ROW, "id": split}])
    splits = tmp_path / "all" / "dataset_dict.json"
    splits.write_text('{"splits": ["train", "test"]}')
    assert read(tmp_path / "all", split="test").ids == ["test"]
    for asked in (None, "dev"):
        with pytest.raises(
            InputError, match=f"splits train, test, got split {asked!r}.*all/<split>"
        ):
            read(tmp_path / "all", split=asked)
    splits.write_text('{"splits": ["train"]}')
    assert read(tmp_path / "all").ids == ["train"]
    splits.write_text('{"splits": "train"}')
    with pytest.raises(InputError, match=r"dataset_dict\.json: expected an object with a list"):
        read(tmp_path / "all")


def test_saved_sets_that_are_none_or_damaged(tmp_path):
    with pytest.raises(InputError, match=r"must be a folder that datasets.save_to_disk wrote"):
        read(tmp_path)
    folder = saved(tmp_path / "set", [ROW])
    (folder / "data-00000-of-00001.arrow").write_bytes(b"plain")
    with pytest.raises(InputError, match=r"00001\.arrow cannot be read as an arrow stream"):
        read(folder)
    (folder / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(InputError, match=r"00001\.arrow cannot be read as an arrow stream"):
        read(folder)
    (folder / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"state\.json: expected a JSON object, got: Expecting"):
        read(folder)
    chosen = saved(tmp_path / "chosen", [ROW], _indices_data_files=[{"filename": "i.arrow"}])
    with pytest.raises(InputError, match=r"call flatten_indices\(\) before save_to_disk"):
        read(chosen)


def test_repeated_conversations_are_found_up_to_case_and_white_space():
    def said(*texts: str) -> Conversation:
        roles = ("user", "assistant") * (len(texts) // 2)
        return tuple(map(Message, roles, texts))

    train = [
        said("Name a  FISH.\n", "eel."),
        said("Name a fish.", "Cod."),
        said("a", "b", "c", "d"),
    ]
    assert repeated(train, [said("name a fish.", "Eel.")]) == [0]
    assert repeated(train, [said("c", "d"), said("A", "B", "C", "D")]) == [2]
    assert repeated(train, []) == []


def test_only_examples_that_are_there_are_found(tmp_path):
    assert find_examples(tmp_path / "nowhere") == {}
    write(tmp_path / EXAMPLES["gsm8k"].file, ROW)
    assert find_examples(tmp_path) == {"gsm8k": tmp_path / EXAMPLES["gsm8k"].file}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_real_sources_are_read_whole(name):
    paths = find_examples(ROOT)
    if name not in paths:
        pytest.skip(f"BADS_DATA names no folder with {name}")
    found = read_instructions(paths[name], source=name, split=EXAMPLES[name].split)
    assert len(found) == len(set(found.ids)) == SIZES[name]
    assert (found.source, found.skipped, found.empty) == (name, 0, 0)
    assert {tuple(m.role for m in one) for one in found.conversations} == {("user", "assistant")}
    if name == "gsm8k":
        assert len(read_instructions(paths[name], source=name, split="test")) == 1_319
    if name == "oasst1":
        turns = [one[0].content.startswith("### Human:") for one in found.conversations]
        assert sum(turns) == 414 + 22 and found.ids[0] == "a38b3d1c-256f-47c5-ab68-c9ab766bad84"
