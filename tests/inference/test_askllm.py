"""Ask-LLM with tiny models made on the spot: probability of yes, padding, caches, wrong input."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bads_ppl.errors import InputError
from inference import askllm
from inference.askllm import PROMPT, Judge, Question, ask, yes_tokens
from models.pretrained import read_tokenizer

TEXTS = [
    "a good answer",
    "no",
    "a much longer and more careful answer than all of the others",
    "ok",
]
CPU = torch.device("cpu")
kinds = pytest.mark.parametrize("kind", ["llama", "t5"])


def question(folder: Path, **changes) -> Question:
    return Question(str(folder), "**{job}** of {curly} kind", **changes)


def by_hand(folder: Path, text: str, job: str) -> float:
    """P(yes) of one text alone, without padding."""
    judge = Judge.load(folder, CPU)
    prompt = PROMPT.format(text=text, job=job)
    ids = judge.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        if judge.model.config.is_encoder_decoder:
            logits = judge.model(input_ids=ids, decoder_input_ids=torch.tensor([[1]])).logits[0, 0]
        else:
            logits = judge.model(input_ids=ids).logits[0, -1]
    return float(logits.softmax(0)[judge.yes].sum())


@kinds
def test_a_score_is_the_probability_of_yes_whatever_else_is_in_the_batch(kind, judges, tmp_path):
    asked = question(judges[kind], batch=3)
    found = ask(TEXTS, asked, cache=tmp_path, device=CPU, chunk=3)
    expected = [by_hand(judges[kind], text, asked.job) for text in TEXTS]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert len(set(found.tolist())) == len(TEXTS) and found.min() > 0 and found.max() < 1


@kinds
def test_yes_is_recognised_with_and_without_capital_and_space(kind, judges):
    judge = Judge.load(judges[kind], CPU)
    said = {judge.tokenizer.decode([token]).strip() for token in judge.yes.tolist()}
    assert said and said <= {"yes", "Yes"} and "yes" in said
    assert judge.tokenizer.padding_side == "right"


def test_tokens_of_several_ways_count_together_and_parts_of_words_do_not(judges):
    words = read_tokenizer(judges["llama"])
    found = yes_tokens(words, judges["llama"]).tolist()
    assert sorted(words.convert_ids_to_tokens(found)) == ["Yes", "yes", "ĠYes", "Ġyes"]
    assert len(words("YES")["input_ids"]) == 3  # Y is no yes

    class Without:
        unk_token_id = 0

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [0] if text == "yes" else [5, 6]}

        def decode(self, ids: list[int]) -> str:
            return "y"

    with pytest.raises(InputError, match="model x has no single token for yes"):
        yes_tokens(Without(), Path("x"))


@kinds
def test_a_long_text_is_cut_and_the_question_is_not(kind, judges, tmp_path):
    asked = question(judges[kind], max_tokens=4)
    long = ["good answer " * 50 + end for end in ("better", "no no no")]
    found = ask(long, asked, cache=tmp_path, device=CPU)
    assert float(found[0]) == float(found[1])
    judge = Judge.load(judges[kind], CPU)
    first = judge.tokenizer(long[0], add_special_tokens=False)["input_ids"][:4]
    cut = judge.tokenizer.decode(first, skip_special_tokens=True)
    assert float(found[0]) == pytest.approx(by_hand(judges[kind], cut, asked.job), rel=1e-4)


def test_scores_are_cached_by_the_content_of_texts_and_model(judges, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(judges["llama"], folder)
    cache = tmp_path / "cache"
    asked = question(folder)
    first = ask(TEXTS, asked, cache=cache, device=CPU)
    loads: list[Path] = []
    load = Judge.load

    def counted(folder: Path, device: torch.device) -> Judge:
        loads.append(folder)
        return load(folder, device)

    monkeypatch.setattr(Judge, "load", counted)
    again = ask(TEXTS, question(folder, batch=1), cache=cache, device=CPU)
    assert loads == [] and torch.equal(first, again)
    ask([*TEXTS[1:], TEXTS[0]], asked, cache=cache, device=CPU)
    ask(TEXTS, question(folder, max_tokens=3), cache=cache, device=CPU)
    assert len(loads) == 2
    moved = tmp_path / "moved"
    folder.rename(moved)
    ask(TEXTS, Question(str(moved), asked.job), cache=cache, device=CPU)
    assert len(loads) == 2  # the same model at another place
    judge = load(moved, CPU)
    with torch.no_grad():
        judge.model.lm_head.weight.mul_(2)
    judge.model.save_pretrained(moved)
    changed = ask(TEXTS, Question(str(moved), asked.job), cache=cache, device=CPU)
    assert len(loads) == 3 and not torch.equal(changed, first)


def test_an_interrupted_pass_does_not_ask_twice(judges, tmp_path, monkeypatch):
    asked: list[str] = []
    probability = Judge.probability

    def stop(judge: Judge, texts: list[str], what: Question) -> torch.Tensor:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.extend(texts)
        return probability(judge, texts, what)

    monkeypatch.setattr(Judge, "probability", stop)
    with pytest.raises(KeyboardInterrupt):
        ask(TEXTS, question(judges["llama"]), cache=tmp_path, device=CPU, chunk=2)
    asked.clear()
    ask(TEXTS, question(judges["llama"]), cache=tmp_path, device=CPU, chunk=2)
    assert asked == TEXTS[2:]


def test_a_model_keeps_the_precision_that_it_was_saved_in(judges, tmp_path):
    Judge.load(judges["llama"], CPU).model.bfloat16().save_pretrained(tmp_path)
    for path in judges["llama"].glob("tokenizer*.json"):
        shutil.copy(path, tmp_path)
    judge = Judge.load(tmp_path, CPU)
    assert {one.dtype for one in judge.model.parameters()} == {torch.bfloat16}


def lacking(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no tensors")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def speechless(folder: Path) -> None:
    for path in folder.glob("tokenizer*.json"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lacking, "lacks the weights of 1 parameters, .* model.norm.weight"),
        (damaged, "cannot be loaded"),
        (pickled, "lacks safetensors weights .*pytorch_model.bin is not read"),
        (speechless, "has no tokenizer that can be used"),
        (shutil.rmtree, "is no folder here"),
    ],
)
def test_a_model_that_cannot_be_read_whole_is_refused(
    spoil, message, judges, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "model"
    shutil.copytree(judges["llama"], folder)
    spoil(folder)
    with pytest.raises(InputError, match=message):
        ask(TEXTS, question(folder), cache=tmp_path, device=CPU)


@pytest.mark.parametrize("name", ["batch", "max_tokens"])
def test_numbers_out_of_range_are_refused(name):
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        Question("m", "j", **{name: 0})


def test_the_prompt_asks_for_yes_or_no_about_the_text_and_the_job():
    prompt = askllm.PROMPT.format(text="TEXT", job="JOB")
    assert prompt.index("TEXT") < prompt.index("JOB") < prompt.index("yes") < prompt.index("no\n")
