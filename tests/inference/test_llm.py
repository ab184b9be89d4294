"""The task llm: its sources and targets, what it refuses, and whole runs of it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.selection import Selection
from inference import next_tokens
from inference.folder import MODEL, SCORES, SELECTED, WEIGHTED, WRITTEN
from inference.instruction_sets import Target, shuffled
from inference.instructions import Instructions, Message
from inference.llm import llm
from inference.llm_outputs import Delivery
from inference.made_instructions import made_instructions
from inference.next_tokens import NextTokens
from inference.scoring import MeanOfTheta
from inference.tasks import Task
from models.causal import Causal, read_causal
from models.chat import SIZES, Chat, build_folder
from models.language import IGNORED
from models.pretrained import read_tokenizer

ROOT = Path(os.environ.get("BADS_DATA", "data"))
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip
RUN = (
    "task=llm",
    "data.source=generated",
    "task.data.vocabulary=400",
    "task.data.pretraining=0",
    "task.data.tested=20",
    "steps=4",
    "burn_in=2",
    "thinning=1",
    "evaluate_every=2",
    "chains=1",
    "sampler.train_batch=8",
    "sampler.meta_batch=4",
)


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiny", SMALL)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built models, which the tests share."""
    return tmp_path_factory.mktemp("cache")


def written(path: Path, pairs: list[tuple[str, str]]) -> str:
    rows = [json.dumps({"prompt": prompt, "response": said}) for prompt, said in pairs]
    path.write_text("".join(f"{row}\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Two sources, one of which has an example of the test file, and a set of checked examples."""
    near = [(f"What comes after {k}?", f"It is {k + 1}.") for k in range(30)]
    far = [(f"Colour of thing {k}?", "red" if k % 2 else "blue") for k in range(20)]
    meta = [(f"What comes after {k}?", f"It is {k + 1}.") for k in range(30, 54)]
    test = [(f"What comes after {k}?", f"It is {k + 1}.") for k in range(28, 29)]
    test += [(f"What comes after {k}?", f"It is {k + 1}.") for k in range(60, 70)]
    sets = {"near": near, "far": far, "meta": meta, "test": test}
    return {name: written(tmp_path / f"{name}.jsonl", pairs) for name, pairs in sets.items()}


@pytest.fixture
def make(cache, files):
    """The task of these files with further options."""

    def build(seed: int = 0, **options) -> Task:
        given = {
            "root": "none",
            "source": "auto",
            "sources": {"near": files["near"], "far": files["far"]},
            "meta": files["meta"],
            "test": files["test"],
            "vocabulary": 300,
            "pretraining": 0,
            "max_tokens": 64,
        }
        return llm(seed=seed, cache=cache, **{**given, **options})

    return build


@pytest.fixture(scope="session")
def named(tmp_path_factory) -> Path:
    """The folder of a pretrained model whose tokenizer has no chat template."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setitem(SIZES, "tiny", SMALL)
        texts = ["It is a sum. yes Yes yes Yes", *"yes yes yes Yes Yes"]
        built = build_folder(tmp_path_factory.mktemp("built"), texts * 9, "tiny", 300)
        folder = tmp_path_factory.mktemp("named")
        Causal(built, pretrained=False).save(folder)
    about = json.loads((built / "tokenizer_config.json").read_text())
    del about["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    shutil.copy(built / "tokenizer.json", folder)
    return folder


@pytest.fixture
def run(call, cache, tmp_path):
    """A run of the command with further options, and its folder."""

    def build(*options: str) -> Path:
        done = call(*RUN, f"cache={cache}", f"run_dir={tmp_path / 'run'}", *options)
        assert done.code == 0, done.err
        return tmp_path / "run"

    return build


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------- sets


def test_points_are_the_conversations_of_the_sources_in_their_order(make):
    task = make()
    assert len(task.train) == 30 - 1 + 20  # one is a test example
    assert task.texts[0] == "user: What comes after 0?\nassistant: It is 1."
    assert {name: int(mask.sum()) for name, mask in task.groups.items()} == {"near": 29, "far": 20}
    assert task.columns["example"][:3] == ["0", "1", "2"] and task.columns["example"][-1] == "19"
    chat = Chat(Path(task.network["folder"]), 64)
    whole = chat.encode([[("user", "What comes after 0?"), ("assistant", "It is 1.")]])
    first = task.train.input["mask"][0].sum()
    assert task.train.input["ids"][0][:first].tolist() == whole.ids[0]
    assert task.train.target[0][:first].tolist() == whole.labels[0]
    ids = torch.cat([task.train.ids, task.meta.ids, task.test.ids, task.scoring.validation.ids])
    assert len(ids.unique()) == len(ids)


def test_what_is_tested_on_is_never_trained_on_and_meta_examples_are_told(make, files):
    sources = {"near": files["near"], "copy": files["meta"]}
    task, without = make(sources=sources), make(sources=sources, remove_meta=True)
    for name, count in (("near", 1), ("copy", 12)):
        told = f"{count} examples of source '{name}' are test or validation examples and were left"
        assert any(note.startswith(told) for note in task.warnings)
    assert not any("after 28?" in text for text in task.texts)
    assert int(task.groups["copy"].sum()) == 12
    assert any(
        "12 examples of source 'copy' are meta examples and stay" in n for n in task.warnings
    )
    own = {tuple(row) for row in task.meta.input["ids"].tolist()}
    assert own == {tuple(row) for row in task.train.input["ids"][task.groups["copy"]].tolist()}
    assert any("are meta examples and were left out" in note for note in without.warnings)
    assert "copy" not in without.groups


def said(*sets: Data) -> set[tuple[int, ...]]:
    """Token ids of conversations, without padding."""
    return {
        tuple(row[mask == 1].tolist())
        for data in sets
        for row, mask in zip(data.input["ids"], data.input["mask"], strict=True)
    }


def test_what_is_set_aside_of_a_file_to_test_on_is_the_same_under_any_seed(make, files, tmp_path):
    several = [make(seed, test=None) for seed in range(4)]
    assert len({frozenset(said(one.meta)) for one in several}) > 1
    (tested,) = {frozenset(said(one.test)) for one in several}
    assert len(tested) == 24 // 4
    for one in several:
        meta, validation = said(one.meta), said(one.scoring.validation)
        assert len(meta) == len(validation) == 9 and not meta & validation
        assert not tested & (meta | validation)
    both = Path(files["meta"]).read_text() + Path(files["test"]).read_text()
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(both)
    one = make(meta=str(mixed))
    assert "11 meta examples are test examples and were left out" in one.warnings
    assert not said(one.meta, one.scoring.validation) & said(one.test)


def test_rows_that_are_left_out_of_checked_files_are_told(make, files):
    for name in ("meta", "test"):
        with Path(files[name]).open("a") as file:
            file.write('{"prompt": "a", "response": " "}\n' * 2 + "{\n")
    told = make(empty="drop", on_error="skip").warnings
    for name in ("meta", "test"):
        assert (
            f"2 rows of the {name} file have an empty prompt or response and were left out" in told
        )
        assert f"1 rows of the {name} file are malformed and were left out" in told


def test_what_a_reader_must_know_is_said_when_the_run_begins(call, cache, tmp_path):
    done = call(*RUN, f"cache={cache}", f"run_dir={tmp_path / 'run'}", "task.data.max_tokens=8")
    notes = results(tmp_path / "run")["warnings"]
    assert any("train conversations have more than 8 tokens" in note for note in notes)
    assert all(f"{note}\n" in done.err for note in notes)


def test_validation_reports_on_other_examples_than_it_chooses_by(make):
    plain, tuned = make(), make(split="validation")
    whole, chosen = said(plain.scoring.validation), said(tuned.scoring.validation)
    reported = said(tuned.test)
    assert chosen | reported == whole and not chosen & reported


def test_every_response_of_a_shuffled_source_is_that_of_another():
    said = [(Message("user", f"q{k}"), Message("assistant", f"a{k}")) for k in range(50)]
    source = Instructions("s", [str(k) for k in range(50)], said)
    for seed in range(5):
        moved = shuffled(source, seed).conversations
        assert [one[0] for one in moved] == [one[0] for one in said]
        assert sorted(one[1].content for one in moved) == sorted(one[1].content for one in said)
        assert all(a[1] != b[1] for a, b in zip(moved, said, strict=True))
    assert shuffled(source, 0).conversations != shuffled(source, 1).conversations


def test_a_source_is_shuffled_on_demand_and_thinned_by_the_seed(make):
    plain, trouble = make(), make(shuffle=["near"])
    near = int(plain.groups["near"].sum())
    assert plain.texts[near:] == trouble.texts[near:]
    assert sum(a != b for a, b in zip(plain.texts[:near], trouble.texts[:near], strict=True)) > 25
    few = [make(seed, per_source=5) for seed in range(3)]
    assert len({one.network["folder"] for one in few}) == 1  # one tokenizer, that of all examples
    assert all(len(one.train) <= 10 and one.groups["far"].sum() == 5 for one in few)
    assert len({tuple(one.texts) for one in few}) == 3


def test_longer_conversations_are_cut_left_out_or_refused(make, files, tmp_path):
    long = [("Say it.", "word " * 60), ("word " * 60, "No."), ("Short?", "Yes.")]
    sources = {"near": files["near"], "long": written(tmp_path / "long.jsonl", long)}
    cut = make(sources=sources)
    assert int(cut.groups["long"].sum()) == 3
    (note,) = [note for note in cut.warnings if "more than 64 tokens" in note]
    assert note.startswith("2 of ") and ": cut, 1 of them at the beginning of the prompt" in note
    assert int(make(sources=sources, long="drop").groups["long"].sum()) == 1
    with pytest.raises(InputError, match=r"2 of \d+ train .*raise task.data.max_tokens"):
        make(sources=sources, long="refuse")


def test_a_conversation_that_the_template_refuses_is_named_by_source_and_id(
    make, files, named, tmp_path
):
    folder = shutil.copytree(named, tmp_path / "strict")
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about["chat_template"] = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no such role') }}"
        "{% endif %}{{ m.content }} {% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    messages = [("system", "Be brief."), ("user", "Red?"), ("assistant", "Yes.")]
    row = {"id": "k7", "messages": [{"role": role, "content": said} for role, said in messages]}
    (tmp_path / "led.jsonl").write_text(json.dumps(row) + "\n")
    sources = {"near": files["near"], "led": str(tmp_path / "led.jsonl")}
    with pytest.raises(InputError, match=r"conversation 'k7' of source led.*no such role"):
        make(sources=sources, model=str(folder))


def test_without_files_there_is_a_made_set(cache):
    task = llm(root="none", source="auto", seed=0, cache=cache, vocabulary=400)
    assert task.dataset == "made" and set(task.groups) == {"sums", "sentences", "wrong"}
    assert any("made on the spot" in note for note in task.warnings)
    sources, aim = made_instructions()
    own, _, wrong = (one.conversations for one in sources)
    asked = [one[0].content for one in (*own, *wrong, *aim.meta, *aim.validation, *aim.test)]
    assert len(set(asked)) == len(asked)


def test_a_benchmark_is_the_target_and_examples_are_the_sources(cache):
    if not (ROOT / "arc.jsonl.gz").is_file() or not (ROOT / "dolly_15k.jsonl.gz").is_file():
        pytest.skip("BADS_DATA names no folder with ARC and Dolly")
    task = llm(
        root=str(ROOT),
        source="auto",
        seed=0,
        cache=cache,
        target="arc_easy",
        sources={"mine": "dolly", "maths": "gsm8k"},
        per_source=20,
        vocabulary=400,
        pretraining=0,
        max_tokens=2000,
        tested=50,
    )
    assert {name: int(mask.sum()) for name, mask in task.groups.items()} == {
        "mine": 20,
        "maths": 20,
    }
    assert len(task.meta) == len(task.scoring.validation) == 25 and 40 < len(task.test) <= 50
    assert task.dataset == "instructions for arc_easy"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "here"}, "data.source must be one of auto, files, generated, got 'here'"),
        ({"source": "generated"}, "takes no files"),
        ({"split": "dev"}, "split must be one of"),
        ({"long": "fold"}, "task.data.long must be one of cut, drop, refuse, got 'fold'"),
        ({"pretraining": -1}, "task.data.pretraining must be at least 0, got -1"),
        ({"tested": 0}, "task.data.tested must be at least 1, got 0"),
        ({"selected": "best"}, "task.data.selected must be one of top, sample, got 'best'"),
        ({"meta": None, "test": None, "target": "mmlu", "questions": -1}, "at least 0, got -1"),
        (
            {"target": "mmlu", "questions": 5, "split": "validation"},
            "questions=5 are test questions, got split=validation",
        ),
        ({"questions": 5}, "task.data.questions=5 are of a benchmark, got task.target=None"),
        (
            {"source": "generated", "sources": None, "meta": None, "test": None, "questions": 5},
            "questions=5 are of a benchmark, got task.target=None",
        ),
        (
            {"sources": None},
            r"no sources to weigh: none is named, .*none has none of the examples "
            r"dolly, .*data.train=<file>.*task.data.sources=",
        ),
        ({"shuffle": ["nowhere"]}, "no sources: they are near, far"),
        ({"target": "mmlu"}, "leave one of them out"),
        ({"meta": None}, "goes with data.meta"),
        ({"meta": None, "test": None, "target": "trivia"}, "one of mmlu, arc_easy.*got 'trivia'"),
        ({"meta": None, "test": None, "target": "mmlu"}, "mmlu"),
        ({"sources": {"d": "dolly"}}, "the example 'dolly' is not in"),
        ({"sources": {"d": "no/such.jsonl"}}, "no/such.jsonl"),
        ({"per_source": 0}, "per_source must be at least 1 example, got 0"),
        ({"meta_count": 13}, "meta_count must be from 1 to 12"),
        ({"model": "no/such-model"}, "no/such-model"),
        ({"meta_count": 1, "split": "validation"}, "at least 2 validation examples, got 1"),
        ({"max_tokens": 5, "long": "drop"}, "nothing is left of the"),
        ({"train": "a.jsonl"}, "leave one of them out"),
    ],
)
def test_what_cannot_be_used_is_refused(make, options, message):
    with pytest.raises(InputError, match=message):
        make(**options)


def test_without_a_target_the_questions_are_those_of_mmlu(make, monkeypatch):
    some = [(Message("user", f"{k}?"), Message("assistant", "A")) for k in range(6)]
    aim, asked = Target("mmlu", some[:2], some[2:4], some[4:]), []

    def evaluate(model, names, **options):
        asked.append((names, options["limit"]))
        return {"mmlu": SimpleNamespace(accuracy=0.25, normalised=None)}

    monkeypatch.setattr("inference.llm.read_target", lambda root, target, **options: aim)
    monkeypatch.setattr("inference.llm.check", lambda names: None)
    monkeypatch.setattr("inference.llm.evaluate", evaluate)
    task = make(meta=None, test=None, questions=7)
    assert task.scoring.ask(SimpleNamespace(model=None)) == {"benchmark": 0.25}
    assert asked == [(["mmlu"], 7)]


def test_other_examples_are_read_for_a_built_model_alone(make, named, tmp_path):
    (tmp_path / "alpaca_sample_15k.jsonl.gz").write_bytes(b"damaged")
    make(root=str(tmp_path), model=str(named))
    with pytest.raises(InputError, match="alpaca_sample_15k"):
        make(root=str(tmp_path))


# --------------------------------------------------------------------------------- next tokens


class Teller(torch.nn.Module):
    """Tells the token `right` places on from the label, with a log-probability of its own."""

    def __init__(self, right: float = 0.0) -> None:
        super().__init__()
        self.right = torch.nn.Parameter(torch.tensor(right))

    def read(self, input):
        labels = input["labels"]
        counted = labels != IGNORED
        good = (labels >= self.right.detach()) & counted
        return torch.where(counted, -labels.float() / 10, torch.zeros(())), good


def examples(*rows: list[int]) -> Data:
    labels = torch.tensor(rows)
    return Data({"ids": labels, "mask": torch.ones_like(labels), "labels": labels}, labels)


def test_accuracy_is_over_tokens_and_loss_over_examples():
    test = examples([IGNORED, 1, 2, 3], [IGNORED, 9, IGNORED, IGNORED])
    scoring = NextTokens(examples([IGNORED, 5, 5, 5]), batch=1)
    one = scoring.measure(test, None, None, Teller(2.0))
    row = one.on_evaluate(Teller(2.0), burnt_in=False)
    assert row["test.accuracy"] == pytest.approx(3 / 4)
    assert row["test.loss"] == pytest.approx((0.2 + 0.9) / 2)
    assert row["validation.accuracy"] == 1 and row["validation.loss"] == pytest.approx(0.5)


def test_the_network_to_keep_is_the_best_by_validation_after_burn_in():
    test, validation = examples([IGNORED, 1, 2, 3]), examples([IGNORED, 4, 5, 6])
    one = NextTokens(validation).measure(test, None, None, Teller())
    for right, burnt_in in ((0.0, False), (4.5, True), (5.5, True), (9.5, True)):
        one.on_evaluate(Teller(right), burnt_in=burnt_in)
    kept, told = one.kept(Teller(9.5))
    assert float(kept.right) == 4.5 and told.accuracy == pytest.approx(2 / 3)
    again = NextTokens(validation).measure(test, None, None, Teller())
    for name, value in again.state_dict().items():
        value.copy_(one.state_dict()[name])
    assert float(again.kept(Teller())[0].right) == 4.5
    again.on_evaluate(Teller(5.5), burnt_in=True)
    assert float(again.kept(Teller())[0].right) == 4.5  # a worse one changes nothing
    mean = NextTokens(validation).measure(test, None, None, Teller())
    for right in (2.0, 6.0):  # accuracy 1 and 1/3; their mean has 1
        mean.on_evaluate(Teller(right), burnt_in=True)
    assert float(mean.kept(Teller())[0].right) == 4.0
    ended = [SimpleNamespace(measure=one, network=Teller(1.5))]
    numbers = NextTokens(validation).scored(test, ended).numbers
    assert numbers["accuracy"] == 0 and numbers["accuracy_last"] == pytest.approx(2 / 3)
    assert numbers["validation_accuracy"] == pytest.approx(2 / 3) and numbers["count"] == 1


def test_networks_that_may_be_kept_share_what_is_frozen():
    network = torch.nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    mean, before = MeanOfTheta(network), network.weight.detach().clone()
    for _ in range(2):
        mean.add(network)
        with torch.no_grad():
            network.weight.add_(1.0)
    found = mean.put(network)
    assert found.bias is network.bias and found.weight is not network.weight
    assert torch.allclose(found.weight, before + 0.5)
    assert torch.allclose(network.weight, before + 2)


def test_examples_without_a_response_cannot_be_scored():
    with pytest.raises(InputError, match="1 of 2 meta examples have no token of a response"):
        NextTokens(examples([IGNORED, 3])).check(
            examples([IGNORED, 3]), examples([IGNORED, 3], [IGNORED, IGNORED])
        )


# --------------------------------------------------------------------------------- whole runs


def test_a_run_leaves_weights_the_selected_examples_and_the_model(run, cache):
    folder = run("sparsity=0.1")
    found, table = results(folder), pd.read_parquet(folder / "weights.parquet")
    assert list(found["test"])[:2] == ["accuracy", "loss"]
    assert set(found["groups"]) == {"sums", "sentences", "wrong"} == set(table["group"])
    weighted, selected = lines(folder / WEIGHTED), lines(folder / SELECTED)
    assert len(weighted) == len(table) == 900 and len(selected) == 90
    assert np.allclose([row["weight"] for row in weighted], table["mean"])
    assert [row["id"] for row in weighted] == table["example"].tolist()
    least = min(row["weight"] for row in selected)
    assert least >= max(row["weight"] for row in weighted if not row["selected"])
    assert [row for row in weighted if row["selected"]] == selected
    assert selected[0]["messages"][-1]["role"] == "assistant"
    model = AutoModelForCausalLM.from_pretrained(folder / MODEL)
    assert model.config.hidden_size == 16
    chats = [
        Chat(place, 99)
        for place in (folder / MODEL, *(path.parent for path in cache.glob("llama*/config.json")))
    ]
    said = [[(one["role"], one["content"]) for one in selected[0]["messages"]]]
    assert chats[0].vocabulary == 400
    assert any(chats[0].encode(said).ids == chat.encode(said).ids for chat in chats[1:])
    known = {path for pattern in WRITTEN for path in folder.glob(pattern)}
    assert set(folder.iterdir()) == known  # what overwrite=true removes
    card = (folder / MODEL / "README.md").read_text()
    assert "base_model" not in card and "- Data: sums (300), sentences (300), wrong (300)" in card
    for name, group in found["groups"].items():
        low, high = group["interval"]
        assert f"{name} {group['mean_weight']:.3f} ({low:.3f} to {high:.3f})" in card
    assert "method bads, model normalised, weights network, sampler preconditioned" in card
    settings = OmegaConf.create(card.split("```yaml")[1].split("```")[0])
    config = OmegaConf.load(folder / "config.yaml")
    assert (settings.steps, settings.chains, settings.seed, settings.sparsity) == (4, 1, 0, 0.1)
    for name in ("method", "model", "weights", "sampler", "backbone", "prior", "task"):
        assert settings[name] == config[name], name
    assert "run_dir" not in settings and "cache" not in settings


@pytest.mark.parametrize(
    "options",
    [
        ("model=joint",),
        ("weights=instance",),
        ("backbone.tune=lora", "backbone.rank=2"),
        ("method=blo",),
        ("method=mixing", "backbone.rows=3", "task.data.loss=sequence"),
        ("method=random_select", "backbone.precision=bfloat16"),
        ("method=dup_meta", "backbone.checkpoint=true"),
        ("method=meta_only",),
        ("method=cds", "method.proxy.steps=2", "method.rule.tuning_steps=2"),
        ("method=rho_loss", "method.proxy.steps=2"),
        ("method=classact", "method.proxy.steps=2"),
        ("method=rds", "method.proxy.steps=2"),
        ("method=askllm", "method.rule.model={named}", "method.rule.max_tokens=32"),
    ],
    ids=lambda options: "-".join(options[:1]),
)
def test_every_method_runs_on_it(run, named, options):
    options = [option.format(named=named) for option in options]
    folder = run("steps=2", "burn_in=1", "evaluate_every=2", *options)
    assert 0 <= results(folder)["test"]["accuracy"] <= 1
    name = "adapter_model" if "lora" in options[0] else "model"
    assert (folder / MODEL / f"{name}.safetensors").is_file()
    equal = options[0] in ("method=mixing", "method=dup_meta", "method=meta_only")
    told = any(note.startswith("all weights are equal") for note in results(folder)["warnings"])
    assert (folder / SELECTED).exists() == (not equal) and told == equal
    assert any(row["selected"] for row in lines(folder / WEIGHTED)) == (not equal)


def test_an_adapter_of_a_built_model_takes_it_along(call, tmp_path):
    """Without pretraining it is nowhere else; with it in the cache, which may be removed."""
    cache, folder = tmp_path / "cache", tmp_path / "run"
    done = call(*RUN, f"cache={cache}", f"run_dir={folder}", "backbone.tune=lora")
    assert done.code == 0, done.err
    shutil.rmtree(cache)
    about = json.loads((folder / MODEL / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(folder / MODEL / "base")
    assert "base_model" not in (folder / MODEL / "README.md").read_text()
    model, tokenizer = read_causal(folder / MODEL)
    ids = tokenizer("What is 2 plus 3?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
    assert not torch.equal(found, base)
    own, _ = read_causal(folder / MODEL / "base")
    assert torch.equal(own(ids).logits, base)


def test_an_adapter_names_its_base_and_has_the_layout_that_it_was_trained_on(
    run, named, monkeypatch
):
    monkeypatch.setattr("inference.llm.find_model", lambda name: named)
    options = ["backbone.tune=lora", "task.model=nobody/tiny"]
    folder = run("steps=2", "burn_in=1", "evaluate_every=2", *options) / MODEL
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\nbase_model: nobody/tiny\ntags:")
    about = json.loads((folder / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == "nobody/tiny" and not (folder / "base").exists()
    monkeypatch.setattr("models.causal.find_model", lambda name: named)
    asked = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    assert read_tokenizer(named).chat_template is None
    for tokenizer in (read_causal(folder)[1], read_tokenizer(folder)):
        laid_out = tokenizer.apply_chat_template(asked, tokenize=False)
        assert laid_out == "User: What?\nAssistant: That.<|end|>"


def test_a_local_base_is_named_by_where_it_is(make, named, monkeypatch):
    monkeypatch.chdir(named.parent)
    assert make(model=named.name).delivery.base == str(named)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(run, call, cache, tmp_path, monkeypatch):
    """The network to keep is in the checkpoint too."""
    whole = run()
    arguments = (*RUN, f"cache={cache}", f"run_dir={tmp_path / 'other'}", "checkpoint_seconds=0")
    tell, calls = next_tokens.tell, []

    def stop(network, data, batch):
        calls.append(len(data))
        if len(calls) == 5:  # two sets twice along the chain, then at its end
            raise KeyboardInterrupt
        return tell(network, data, batch)

    with monkeypatch.context() as patch:
        patch.setattr(next_tokens, "tell", stop)
        assert call(*arguments).code == 130
    assert call(*arguments, "resume=true").code == 0
    assert results(tmp_path / "other")["test"] == results(whole)["test"]
    assert lines(tmp_path / "other" / SELECTED) == lines(whole / SELECTED)


ABOUT = {
    "sparsity": 0.5,
    "method": "bads",
    "model": "joint",
    "weights": "instance",
    "sampler": "sgld",
    "preset": "default",
    "groups": {"one": {"mean_weight": 0.3, "interval": [0.2, 0.4], "count": 1}},
    "data": {"target": "x", "model": "y"},
}


@pytest.fixture
def chat(tmp_path) -> Chat:
    return Chat(build_folder(tmp_path / "cache", ["a b"], "tiny", 270), 99)


def test_the_model_is_that_of_the_chain_that_is_best_by_validation(tmp_path, chat):
    class Saved(Teller):
        tune = "full"

        def save(self, folder: Path, base: str | None) -> None:
            (folder / "kept.txt").write_text(str(float(self.right.detach())))

    validation = examples([IGNORED, 4, 5, 6])
    ended = []
    for right in (9.0, 4.0, 6.0):
        one = NextTokens(validation).measure(validation, None, None, Saved())
        one.on_evaluate(Saved(right), burnt_in=True)
        ended.append(SimpleNamespace(measure=one, network=Saved()))
    draws = [np.array([[0.2, 0.9], [0.4, 0.7]], dtype=np.float32)]
    selection = Selection.from_draws(np.arange(2), draws)
    said = (Message("user", "a"), Message("assistant", "b"))
    delivery = Delivery([("one", "0", said), ("two", "7", said)], chat)
    for _ in range(2):  # summed up again, it is replaced
        assert delivery(tmp_path, selection, ended, ABOUT, {}) == []
    assert (tmp_path / MODEL / "kept.txt").read_text() == "4.0"
    (selected,) = lines(tmp_path / SELECTED)
    assert selected["id"] == "7" and selected["weight"] == pytest.approx(0.8)


def test_examples_are_sampled_in_proportion_to_their_weight(chat):
    weights = np.array([0.0, 0.1, 0.2, 0.3], dtype=np.float32)
    selection = Selection.from_draws(np.arange(4), [np.stack([weights, weights])])

    def chosen(seed: int, count: int) -> np.ndarray:
        return Delivery((), chat, selected="sample", seed=seed)._chosen(selection, count)

    first = np.array([chosen(seed, 1)[0] for seed in range(2000)])
    shares = np.bincount(first, minlength=4) / len(first)
    expected = weights / weights.sum()
    assert shares[0] == 0
    assert np.abs(shares - expected).max() < 4 * (0.25 / len(first)) ** 0.5
    assert all(chosen(seed, 3).tolist() == [1, 2, 3] for seed in range(20))  # none twice
    assert chosen(5, 2).tolist() == chosen(5, 2).tolist()
    assert chosen(5, 4).tolist() == [1, 2, 3]  # none of weight 0


def test_a_built_model_does_not_learn_the_target(make, tmp_path, monkeypatch):
    """Of the examples that are no sources it reads all but those that are selected for."""
    seen = []

    def pretrained(folder, conversations, **options):
        seen.extend((one[0].content, one[1].content) for one in conversations)
        return folder

    monkeypatch.setattr("inference.llm.pretrained_causal", pretrained)
    others = [(f"Tell {k}.", f"It is {k}.") for k in range(30)]
    rows = [{"instruction": prompt, "output": response} for prompt, response in others]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "alpaca_sample_15k.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    make(
        root=str(tmp_path),
        meta=written(tmp_path / "mine.jsonl", others[:8]),
        test=written(tmp_path / "theirs.jsonl", others[8:12]),
        pretraining=1,
    )
    assert sorted(seen) == sorted(others[12:])


def test_scores_of_another_model_go_with_it(tmp_path, chat):
    network = Causal(next((tmp_path / "cache").iterdir()), pretrained=False)
    kept = SimpleNamespace(kept=lambda _: (network, next_tokens.Told(0.5, 1.0)))
    ended = [SimpleNamespace(measure=kept, network=network)]
    draws = [np.array([[0.2, 0.9]], dtype=np.float32)]
    selection = Selection.from_draws(np.arange(2), draws)
    rows = [("one", str(k), (Message("user", "a"), Message("assistant", "b"))) for k in (0, 7)]
    deliver = Delivery(rows, chat)
    deliver(tmp_path, selection, ended, ABOUT, {})
    (tmp_path / SCORES).write_text("{}")
    deliver(tmp_path, selection, ended, ABOUT, {})  # summed up again, the model is the same
    assert (tmp_path / SCORES).exists()
    with torch.no_grad():
        next(network.parameters()).add_(1.0)
    deliver(tmp_path, selection, ended, ABOUT, {})
    assert not (tmp_path / SCORES).exists()
