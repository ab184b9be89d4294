"""Benchmark scores: by hand, beside lm-eval's own tasks, of runs, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bads_ppl.errors import InputError
from inference.benchmark_files import BENCHMARKS, benchmark_splits, conversation, read_benchmark
from inference.benchmark_scores import Score, Scores, evaluate
from inference.benchmark_tasks import FEWSHOT_SEED, file_tasks
from inference.benchmarks import main, parse, table
from inference.run import compose_run
from inference.run import run as run_once
from models.causal import Causal, read_causal
from models.chat import SIZES, build_folder
from models.pretrained import read_tokenizer

pytest.importorskip("lm_eval", reason="needs lm-eval (bads-ppl[llm])")
datasets = pytest.importorskip("datasets", reason="needs lm-eval (bads-ppl[llm])")

ROOT = Path(os.environ.get("BADS_DATA", "data"))
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip
SUBJECTS = ("abstract_algebra", "high_school_us_history")
WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "cats",
    "dogs",
    "birds",
    "run",
    "sit",
    "fly",
    "fast",
    "slow",
]


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice(WORDS, count))


def repeated(rows: list[dict], split: str) -> list[dict]:
    """The rows, and one of a split again in the test split."""
    first = next(row for row in rows if row["split"] == split)
    return [*rows, {**first, "split": "test", **({"id": "again"} if "id" in first else {})}]


def mmlu(rng: np.random.Generator) -> list[dict]:
    return repeated(
        [
            {
                "benchmark": "mmlu",
                "split": split,
                "subject": subject,
                "question": f" {split} {k}, {words(rng, 4)}? ",
                "choices": [words(rng, 2) for _ in range(4)],
                "answer": int(rng.integers(4)),
            }
            for split, count in (("dev", 3), ("val", 2), ("test", 6))
            for subject in SUBJECTS
            for k in range(count + (subject == "high_school_us_history") * (split == "test"))
        ],
        "val",
    )


def arc(rng: np.random.Generator) -> list[dict]:
    return repeated(
        [
            {
                "benchmark": name,
                "split": split,
                "id": f"{name}-{split}-{k}",
                "question": f"{name} {split} {k}, {words(rng, 3)}?",
                "choices": [words(rng, int(rng.integers(1, 5))) for _ in range(3 + k % 2)],
                "answer": int(rng.integers(3)),
            }
            for name in ("arc_easy", "arc_challenge")
            for split, count in (("train", 5), ("dev", 3), ("test", 9))
            for k in range(count)
        ],
        "dev",
    )


def hellaswag(rng: np.random.Generator) -> list[dict]:
    return [
        {
            "benchmark": "hellaswag",
            "split": "val",
            "subject": "Fishing",
            "question": f"Fishing: A man has {k} {words(rng, 2)}. {words(rng, 2)}",
            "choices": [words(rng, int(rng.integers(1, 6))) + " Ünd so." for _ in range(4)],
            "answer": int(rng.integers(4)),
        }
        for k in range(60)
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A data folder with a few questions of each benchmark."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    rows = {"mmlu": mmlu(rng), "arc_easy": arc(rng), "hellaswag": hellaswag(rng)}
    for name, some in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / BENCHMARKS[name].file).write_bytes(gzip.compress(text.encode()))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random Llama, far enough from uniform to have opinions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", SMALL)
        made = build_folder(tmp_path_factory.mktemp("cache"), WORDS * 20, "tiny", 330)
    torch.manual_seed(0)
    network = Causal(made, pretrained=False)
    with torch.no_grad():
        for value in network.parameters():
            if value.ndim == 2:
                value.mul_(6)
    network.save(made)
    return made


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory) -> Path:
    """An adapter on it that changes what it says."""
    torch.manual_seed(1)
    network = Causal(folder, pretrained=True, tune="lora", rank=2)
    with torch.no_grad():
        for value in network.parameters():
            value.normal_(std=0.3)
    target = tmp_path_factory.mktemp("adapter")
    network.save(target)
    return target


@pytest.fixture
def hub(root, monkeypatch):
    """The same questions as the hub has them, in place of the hub."""
    found = {name: read_benchmark(root, name) for name in BENCHMARKS}

    def split(name: str, split: str, subject: str | None = None) -> list:
        return [q for q in found[name] if q.split == split and subject in (None, q.subject)]

    def fields(q) -> dict:
        letters = ["A", "B", "C", "D"] if len(q.choices) == 4 else ["1", "2", "3"]
        if q.benchmark == "mmlu":
            return {"question": q.question, "subject": q.subject, "choices": list(q.choices),
                    "answer": q.answer}  # fmt: skip
        if q.benchmark == "hellaswag":
            before, _, last = q.question.partition(": ")[2].partition(". ")
            return {"ctx_a": f"{before}.", "ctx_b": last, "activity_label": q.subject,
                    "endings": list(q.choices), "label": str(q.answer)}  # fmt: skip
        return {"id": q.id, "question": q.question, "answerKey": letters[q.answer],
                "choices": {"text": list(q.choices), "label": letters}}  # fmt: skip

    def load(path, name=None, **_):
        asked = {
            "cais/mmlu": ("mmlu", {"dev": "dev", "validation": "val", "test": "test"}),
            "allenai/ai2_arc": (
                "arc_easy" if name == "ARC-Easy" else "arc_challenge",
                {"train": "train", "validation": "dev", "test": "test"},
            ),
            "Rowan/hellaswag": ("hellaswag", {"train": "val", "validation": "val"}),
        }[path]
        if path == "cais/mmlu" and name not in SUBJECTS:
            rows = {theirs: [other(theirs, name)] * 2 for theirs in asked[1]}
            rows["dev"] += [other("more", name)]
        else:
            subject = name if path == "cais/mmlu" else None
            rows = {
                theirs: [fields(q) for q in split(asked[0], ours, subject)]
                for theirs, ours in asked[1].items()
            }
        return datasets.DatasetDict(
            {theirs: datasets.Dataset.from_list(some) for theirs, some in rows.items()}
        )

    def other(split: str, subject: str) -> dict:
        """Of a subject that the files do not have: the test question stands in dev, too."""
        text = f"{subject}?" if split in ("dev", "test") else f"{split} {subject}?"
        return {"question": text, "subject": subject, "choices": list("wxyz"), "answer": 0}

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.fixture
def requests(monkeypatch) -> list[tuple[str, str]]:
    """What the model is asked, in order of the questions."""
    from lm_eval.models.huggingface import HFLM

    asked, plain = [], HFLM.loglikelihood

    def record(self, some, **options):
        asked.extend(one.args for one in some)
        return plain(self, some, **options)

    monkeypatch.setattr(HFLM, "loglikelihood", record)
    return asked


def by_hand(model, tokenizer, prompt: str, choice: str) -> float:
    """Log-likelihood of the tokens of a choice after a prompt."""
    begun, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + choice)["input_ids"]
    assert whole[: len(begun)] == begun
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([whole])).logits[0]
    table = logits.double().log_softmax(1)
    return sum(float(table[k - 1, whole[k]]) for k in range(len(begun), len(whole)))


def right(model, tokenizer, questions, prompt=lambda q: conversation(q)[0].content, gap=" "):
    """Whether the likeliest choice is right, and the likeliest by character; by question."""
    found = []
    for q in questions:
        choices = "ABCD" if q.benchmark == "mmlu" else q.choices
        sums = [by_hand(model, tokenizer, prompt(q), gap + choice) for choice in choices]
        lengths = [len(choice) for choice in choices]
        each = np.argmax(sums), np.argmax(np.divide(sums, lengths))
        found.append([place == q.answer for place in each])
    return np.array(found, dtype=float).T


def stderr(hits: np.ndarray) -> float:
    return float(hits.std(ddof=1) / len(hits) ** 0.5)


def asked_of(root: Path, name: str) -> list:
    return benchmark_splits(read_benchmark(root, name), name, seed=3, count=1).test


# ---------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "hellaswag"])
def test_scores_are_those_by_hand(name, root, folder):
    model, tokenizer = read_causal(folder)
    plain, by_length = right(model, tokenizer, asked_of(root, name))
    assert 0 < plain.mean() < 1 and (plain != by_length).any()  # so that each can be told
    found = evaluate(folder, [name], root=root)[name]
    if name != "hellaswag":
        assert found.of == 9  # one more stands in dev
    assert found == Scores(
        accuracy=pytest.approx(plain.mean()),
        stderr=pytest.approx(stderr(plain)),
        count=len(plain),
        of=len(plain),
        source="files",
        cut=0,
        normalised=pytest.approx(by_length.mean()),
        normalised_stderr=pytest.approx(stderr(by_length)),
        subjects={},
    )


def test_scores_of_mmlu_are_those_by_hand_and_by_subject(root, folder):
    model, tokenizer = read_causal(folder)
    questions = asked_of(root, "mmlu")
    hits = {
        subject: right(model, tokenizer, [q for q in questions if q.subject == subject])[0]
        for subject in SUBJECTS
    }
    found = evaluate(folder, ["mmlu"], root=root)["mmlu"]
    assert found.subjects == {
        subject: Score(pytest.approx(one.mean()), pytest.approx(stderr(one)), len(one))
        for subject, one in hits.items()
    }
    assert [len(one) for one in hits.values()] == [6, 7]
    both = np.concatenate(list(hits.values()))
    assert 0 < both.mean() < 1 and len({one.mean() for one in hits.values()}) == 2
    assert found.accuracy == pytest.approx(both.mean())
    within = sum(((one - one.mean()) ** 2).sum() for one in hits.values()) / (len(both) - 2)
    assert found.stderr == pytest.approx((within / len(both)) ** 0.5)
    assert (found.count, found.of, found.normalised) == (13, 13, None)


def test_shots_of_mmlu_are_the_first_of_its_subjects_dev_split(root, folder, requests):
    questions = read_benchmark(root, "mmlu")

    def shown(q) -> str:
        about, _, asked = conversation(q)[0].content.partition("\n\n")
        dev = [one for one in questions if one.split == "dev" and one.subject == q.subject]
        before = [
            f"{conversation(one)[0].content.partition(chr(10) * 2)[2]} {'ABCD'[one.answer]}\n\n"
            for one in dev[:2]
        ]
        return f"{about}\n\n{''.join(before)}{asked}"

    model, tokenizer = read_causal(folder)
    hits, _ = right(model, tokenizer, asked_of(root, "mmlu"), shown)
    found = evaluate(folder, ["mmlu"], root=root, shots=2)["mmlu"]
    assert found.accuracy == pytest.approx(hits.mean())
    assert hits.tolist() != right(model, tokenizer, asked_of(root, "mmlu"))[0].tolist()
    prompts = [shown(q) for q in asked_of(root, "mmlu") for _ in "ABCD"]
    assert [prompt for prompt, _ in requests] == prompts


def test_the_chat_template_lays_questions_out(root, folder, requests):
    model, tokenizer = read_causal(folder)

    def chatted(q) -> str:
        return f"<|user|>{conversation(q)[0].content}<|end|><|assistant|>"

    hits, _ = right(model, tokenizer, asked_of(root, "arc_easy"), chatted, gap="")
    found = evaluate(folder, ["arc_easy"], root=root, chat=True)["arc_easy"]
    assert found.accuracy == pytest.approx(hits.mean())
    assert requests[0][0] == chatted(asked_of(root, "arc_easy")[0])
    requests.clear()
    evaluate(folder, ["mmlu"], root=root, chat=True, limit=1)
    about, _, asked = conversation(asked_of(root, "mmlu")[0])[0].content.partition("\n\n")
    said = f"<|system|>{about}\n\n<|end|><|user|>{asked}<|end|><|assistant|>"
    assert requests == [(said, letter) for letter in "ABCD"]
    requests.clear()
    evaluate(folder, ["mmlu"], root=root, chat=True, limit=1, shots=1)
    first = next(q for q in read_benchmark(root, "mmlu") if q.split == "dev")
    before = conversation(first)[0].content.partition("\n\n")[2]
    turn = f"<|user|>{before}<|end|><|assistant|>{'ABCD'[first.answer]}<|end|><|user|>"
    assert requests[0][0] == said.replace("<|user|>", turn)


@pytest.mark.parametrize("options", [{}, {"shots": 2}, {"shots": 1, "chat": True}, {"limit": 5}])
def test_lm_evals_own_tasks_ask_and_find_the_same(options, root, folder, hub, requests):
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    assert FEWSHOT_SEED == DEFAULT_OTHER_SEED
    names = [name for name in BENCHMARKS if not (options.get("shots") and name == "hellaswag")]
    own = evaluate(folder, names, root=root, source="hub", **options)
    theirs = requests.copy()
    requests.clear()
    ours = evaluate(folder, names, root=root, source="files", **options)
    assert requests == theirs and len(requests) >= 4 * sum(one.count for one in own.values()) - 30
    for name in names:
        assert own[name].source == "hub"
        assert ours[name] == Scores(**{**vars(own[name]), "source": "files"})


def test_shots_of_hellaswag_are_of_the_tenth_that_is_not_tested_on(root, folder, requests):
    evaluate(folder, ["hellaswag"], root=root, shots=1)
    tested = {conversation(q)[0].content for q in asked_of(root, "hellaswag")}
    rest = {conversation(q)[0].content for q in read_benchmark(root, "hellaswag")} - tested
    shown = [prompt.split("\n\n")[0] for prompt, _ in requests]
    assert all(any(one.startswith(text) for text in rest) for one in shown)
    assert {prompt.split("\n\n")[1] for prompt, _ in requests} == tested


def test_a_limit_takes_evenly_spaced_questions_and_tells(root, folder, requests):
    found = evaluate(folder, ["mmlu", "hellaswag"], root=root, limit=4)
    swag = asked_of(root, "hellaswag")
    assert (found["hellaswag"].count, found["hellaswag"].of) == (4, len(swag))
    prompts = list(dict.fromkeys(prompt for prompt, _ in requests))
    taken = [conversation(swag[k * len(swag) // 4])[0].content for k in range(4)]
    assert prompts[4:] == taken
    assert {name: one.count for name, one in found["mmlu"].subjects.items()} == {
        "abstract_algebra": 2,
        "high_school_us_history": 2,
    }
    assert "4 of 13, evenly spaced" in table(found)
    single = evaluate(folder, ["mmlu"], root=root, limit=2)["mmlu"]
    assert single.stderr is None and all(one.stderr is None for one in single.subjects.values())
    few = evaluate(folder, ["mmlu"], root=root, limit=3)["mmlu"]
    assert sorted(one.count for one in few.subjects.values()) == [1, 2] and few.stderr is None
    assert evaluate(folder, ["mmlu"], root=root, limit=99)["mmlu"].count == 13


def test_questions_too_long_for_the_model_are_counted(root, folder):
    model, tokenizer = read_causal(folder)
    lengths = [
        [len(tokenizer(f"{conversation(q)[0].content} {c}")["input_ids"]) for c in q.choices]
        for q in asked_of(root, "arc_easy")
    ]
    most = min(map(max, lengths))
    assert any(sum(length > most for length in some) > 1 for some in lengths)
    model.config.max_position_embeddings = most - 1  # the last token is not shown
    found = evaluate((model, tokenizer), ["arc_easy"], root=root)["arc_easy"]
    assert found.cut == sum(max(some) > most for some in lengths) > 0
    assert f"{found.cut} of them cut" in table({"arc_easy": found})


# ---------------------------------------------------------------------------------------- models


def test_an_adapter_is_put_on_the_model_that_it_was_made_for(root, folder, adapter):
    names = ["arc_easy", "hellaswag"]
    plain = evaluate(folder, names, root=root)
    found = evaluate(adapter, names, root=root)
    assert found != plain
    assert evaluate(folder, names, root=root, adapter=adapter) == found
    tuned = Causal(folder, pretrained=True, tune="lora", rank=2)
    state = {
        name.removeprefix("base_model.model."): value
        for name, value in read_causal(adapter)[0].state_dict().items()
    }
    tuned.model.load_state_dict(state)
    hits, _ = right(tuned.model, read_tokenizer(folder), asked_of(root, "hellaswag"))
    assert found["hellaswag"].accuracy == pytest.approx(hits.mean())


def test_a_given_model_is_left_as_it_was(root, folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.train()
    state = torch.get_rng_state()
    given = evaluate((model, read_tokenizer(folder)), ["arc_easy"], root=root, batch=3)
    assert given == evaluate(folder, ["arc_easy"], root=root)
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_adapters_that_cannot_be_used_are_refused(root, folder, adapter, tmp_path):
    def refused(message: str, model=None, **options) -> None:
        with pytest.raises(InputError, match=message):
            evaluate(model or adapter, ["arc_easy"], root=root, **options)

    refused("is an adapter itself", adapter=adapter)
    refused("goes with the folder of a model", model=(torch.nn.Linear(1, 1), None), adapter=adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for key, message in ((None, "got None"), ("no/such", "made for model 'no/such'.*adapter=")):
        other = tmp_path / str(key).replace("/", "-")
        other.mkdir()
        about = {**config, "base_model_name_or_path": key}
        (other / "adapter_config.json").write_text(json.dumps(about))
        refused(message, model=other)
    refused("lacks adapter_model.safetensors", model=folder, adapter=other)
    state = {"base_model.model.no.lora_A.weight": torch.zeros(2, 2)}
    from safetensors.torch import save_file

    save_file(state, other / "adapter_model.safetensors")
    refused("does not fit its model", model=folder, adapter=other)


# -------------------------------------------------------------------------------------- the command


@pytest.fixture
def run(folder, tmp_path) -> Path:
    """What a run of task=llm leaves, as far as it matters here."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(folder)
    (tmp_path / "run" / "results.json").write_text("{}")
    return tmp_path / "run"


def test_a_run_asks_the_network_that_it_keeps(root, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", SMALL)
    rows = [{"prompt": f"{word} {k}?", "response": "two cats"} for k, word in enumerate(WORDS)]
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = (
        "task=llm",
        "task.target=arc_easy",
        "task.meta_count=2",
        f"task.data.sources={{own: '{source}'}}",
        "task.data.vocabulary=300",
        "task.data.pretraining=0",
        "task.data.questions=6",
        f"data.root='{root}'",
        f"cache='{tmp_path / 'cache'}'",
        f"run_dir='{tmp_path / 'run'}'",
        "device=cpu",
        "steps=4",
        "burn_in=2",
        "evaluate_every=2",
        "thinning=1",
        "chains=1",
        "sampler.train_batch=4",
        "sampler.meta_batch=2",
    )
    found = run_once(*compose_run(options, "a test"))["test"]
    (one,) = evaluate(tmp_path / "run" / "model", ["arc_easy"], root=root, limit=6).values()
    assert (found["benchmark"], found["benchmark_normalised"]) == (one.accuracy, one.normalised)


def test_the_command_writes_scores_beside_the_results(run, root, capsys, caplog):
    asked = ["benchmarks=arc_easy,mmlu", f"root={root}", "limit=6", "device=cpu", "batch=2"]
    assert main([str(run), *asked]) == 0
    out, err = capsys.readouterr()
    found = json.loads((run / "benchmarks.json").read_text())
    scores = evaluate(run / "model", ["arc_easy", "mmlu"], root=root, limit=6)
    assert list(found["benchmarks"]) == ["arc_easy", "mmlu"]
    for name, one in found["benchmarks"].items():
        one["subjects"] = {key: Score(**value) for key, value in one["subjects"].items()}
        assert Scores(**one) == scores[name]
    row = next(line for line in out.splitlines() if line.startswith("arc_easy"))
    assert row.split()[1:5] == [
        f"{number:.4f}"
        for number in (
            scores["arc_easy"].accuracy,
            scores["arc_easy"].stderr,
            scores["arc_easy"].normalised,
            scores["arc_easy"].normalised_stderr,
        )
    ]
    assert row.endswith("6 of 9, evenly spaced") and not err and not caplog.records
    how = found["asked"]["mmlu"]
    assert (how["limit"], how["shots"], how["source"]) == (6, 0, "auto")
    assert found["versions"]["lm-eval"]
    before = (run / "benchmarks.json").read_text()
    assert main([str(run / "model"), *asked]) == 0  # the folder below is the same run's
    assert (
        json.loads((run / "benchmarks.json").read_text())["benchmarks"]
        == json.loads(before)["benchmarks"]
    )


def test_a_run_is_scored_by_the_model_that_it_leaves(call, root, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", SMALL)
    options = ["task=llm", "data.source=generated", "task.data.vocabulary=400", "steps=2",
               "task.data.pretraining=0", "burn_in=1", "thinning=1", "chains=1",
               "sampler.train_batch=4", "task.data.tested=5",
               f"cache={tmp_path / 'cache'}"]  # fmt: skip
    for name, more in (("full", []), ("lora", ["backbone.tune=lora", "backbone.rank=2"])):
        done = call(*options, f"run_dir={tmp_path / name}", *more)
        assert done.code == 0, done.err
    asked = [f"root={root}", "benchmarks=arc_easy", "limit=4"]
    assert main([str(tmp_path / "full"), *asked]) == 0
    found = json.loads((tmp_path / "full" / "benchmarks.json").read_text())
    assert found["model"] == str(tmp_path / "full" / "model")
    assert found["benchmarks"]["arc_easy"]["count"] == 4
    assert call(*options, f"run_dir={tmp_path / 'full'}", "overwrite=true").code == 0
    assert not (tmp_path / "full" / "benchmarks.json").exists()
    shutil.rmtree(tmp_path / "cache")  # an adapter takes along what it was put on
    assert main([str(tmp_path / "lora"), *asked]) == 0
    found = json.loads((tmp_path / "lora" / "benchmarks.json").read_text())
    assert found["benchmarks"]["arc_easy"]["count"] == 4


def test_scores_of_a_model_stand_where_one_says(folder, adapter, root, tmp_path, capsys):
    asked = [str(folder), f"adapter={adapter}", "benchmarks=arc_easy", f"root={root}"]
    files = sorted(path.name for path in folder.iterdir())
    assert main(asked) == 0 and "benchmarks.json" not in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == files  # its version stays the same
    assert main([*asked, f"out={tmp_path / 'scores'}"]) == 0
    found = json.loads((tmp_path / "scores" / "benchmarks.json").read_text())
    assert found["asked"]["arc_easy"]["adapter"] == str(adapter)
    assert found["model"] == str(folder)


def test_scores_of_other_benchmarks_stay_and_others_are_not_replaced_unsaid(run, root, capsys):
    def scores() -> dict:
        return json.loads((run / "benchmarks.json").read_text())

    where = [f"root={root}", "device=cpu"]
    assert main([str(run), "benchmarks=mmlu", *where]) == 0
    whole = scores()["benchmarks"]["mmlu"]
    assert main([str(run), "benchmarks=arc_easy", "limit=4", *where]) == 0
    both = scores()
    assert both["benchmarks"]["mmlu"] == whole and both["benchmarks"]["arc_easy"]["count"] == 4
    assert [both["asked"][name]["limit"] for name in ("mmlu", "arc_easy")] == [None, 4]
    with pytest.raises(SystemExit):
        main([str(run), "benchmarks=mmlu", "limit=2", *where])
    assert "scores of mmlu with limit=None: take overwrite=true" in capsys.readouterr().err
    assert scores() == both
    assert main([str(run), "benchmarks=mmlu", "limit=2", "overwrite=true", *where]) == 0
    assert scores()["benchmarks"]["mmlu"]["count"] == 2
    other = {**scores(), "model_version": "another model's"}
    (run / "benchmarks.json").write_text(json.dumps(other))
    assert main([str(run), "benchmarks=arc_easy", *where]) == 0
    assert list(scores()["benchmarks"]) == ["arc_easy"]


def test_a_question_is_never_shown_with_its_answer(tmp_path):
    rng = np.random.default_rng(0)
    rows = [row for row in mmlu(rng) if row["split"] != "dev" or row["subject"] == SUBJECTS[0]]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / BENCHMARKS["mmlu"].file).write_bytes(gzip.compress(text.encode()))
    with pytest.raises(InputError, match=f"{SUBJECTS[1]}, has 0 examples to show, got shots=1"):
        file_tasks(tmp_path, "mmlu", limit=None, shots=1)
    assert file_tasks(tmp_path, "mmlu", limit=None, shots=0).of


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["benchmarks=arc"], "benchmarks are mmlu, arc_easy, arc_challenge, hellaswag, got 'arc'"),
        (["benchmarks="], "got none: name some of these"),
        (["limit=0"], "limit must be at least 1, got 0"),
        (["limit=half"], "limit must be a whole number, got 'half'"),
        (["batch=0"], "batch must be at least 1, got 0"),
        (["shots=-1"], "shots must be at least 0, got -1"),
        (["shots=4", "benchmarks=mmlu"], "mmlu, abstract_algebra, has 3 examples.* at most 3"),
        (["source=net"], "source must be one of auto, files, hub, got 'net'"),
        (["chat=yes"], "chat must be one of true, false, got 'yes'"),
        (["shot=1"], "got 'shot=1': did you mean shots="),
        (["root=none", "source=files"], "there is no file .*none/mmlu.jsonl.gz"),
        (["device=tpu"], "device must be auto, cpu"),
        (["adapter=none"], "adapter none lacks adapter_config.json and adapter_model.safetensors"),
    ],
)
def test_what_cannot_be_is_refused(options, message, run, root, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(run), f"root={root}", *options])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert re.search(f"error: .*{message}", err), err
    assert not (run / "benchmarks.json").exists()


def test_folders_without_a_model_and_templates_that_there_are_not(root, folder, tmp_path, capsys):
    for name in (str(tmp_path), str(tmp_path / "absent")):
        with pytest.raises(SystemExit) as stop:
            main([name, f"root={root}"])
        assert stop.value.code == 2 and "holds no model" in capsys.readouterr().err
    model, tokenizer = read_causal(folder)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template: leave out chat=true"):
        evaluate((model, tokenizer), ["arc_easy"], root=root, chat=True)


def test_without_lm_eval_it_is_said_what_to_install(root, folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"need the package lm-eval: pip install bads-ppl\[llm\]"):
        evaluate(folder, ["arc_easy"], root=root)


def test_a_hub_that_does_not_answer(root, folder, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"hub does not give arc_easy \(no route\).*source=files"):
        evaluate(folder, ["arc_easy"], root=tmp_path)


def test_the_data_folder_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("BADS_DATA", "there")
    assert parse([]).asked["root"] == Path("there")
    assert parse(["root=here"]).asked["root"] == Path("here")


# -------------------------------------------------------------------------------------- real files


def test_real_questions_are_asked_as_they_stand(folder, requests):
    if not all((ROOT / form.file).is_file() for form in BENCHMARKS.values()):
        pytest.skip("BADS_DATA names no folder with the benchmarks")
    found = evaluate(folder, root=ROOT, limit=8, batch=4)
    assert [(one.count, one.of) for one in found.values()] == [
        (8, 13_989),
        (8, 2_369),
        (8, 1_163),
        (8, found["hellaswag"].of),
    ]
    assert len(found["mmlu"].subjects) == 8 and 8_900 < found["hellaswag"].of < 9_150
    assert requests[0][0].startswith(
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    )
