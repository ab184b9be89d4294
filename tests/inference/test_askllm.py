"""Ask-LLM with tiny models made on the spot: probability of yes, padding, caches, wrong input."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from bads_ppl.errors import InputError
from inference import askllm
from inference.askllm import PROMPT, Judge, Question, ask, yes_tokens

TEXTS = [
    "a good answer",
    "no",
    "a much longer and more careful answer than all of the others",
    "ok",
]
CPU = torch.device("cpu")
CORPUS = [*TEXTS, PROMPT, "yes no Yes No answer answers good better yes"] * 3


def tokenizer(kind: str, **special: str) -> PreTrainedTokenizerFast:
    """Bytes (as Llama 3) or words with a sign for the space before them (as T5), small."""
    tokens = ["<unk>", "<pad>", "</s>"]
    if kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
        )
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=tokens, unk_token="<unk>", show_progress=False
        )
    made.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", **special)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A causal model whose tokenizer has no padding, and a sequence-to-sequence one."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("llama", "t5")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        words = tokenizer("bytes")
        causal = LlamaConfig(vocab_size=len(words), num_hidden_layers=2, **size)
        LlamaForCausalLM(causal).save_pretrained(made["llama"])
        words.save_pretrained(made["llama"])
        words = tokenizer("words", unk_token="<unk>", pad_token="<pad>")
        ids = {"decoder_start_token_id": 1, "pad_token_id": 1, "eos_token_id": 2}
        pairs = T5Config(
            vocab_size=len(words), d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2, **ids
        )
        T5ForConditionalGeneration(pairs).save_pretrained(made["t5"])
        words.save_pretrained(made["t5"])
    return made


kinds = pytest.mark.parametrize("kind", ["llama", "t5"])


def question(folder: Path, **changes) -> Question:
    return Question(str(folder), "**{job}** of {curly} kind", **changes)


def by_hand(folder: Path, text: str, job: str) -> float:
    """P(yes) of one text alone, without padding."""
    judge = Judge.load(str(folder), CPU)
    prompt = PROMPT.format(text=text, job=job)
    ids = judge.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        if judge.model.config.is_encoder_decoder:
            logits = judge.model(input_ids=ids, decoder_input_ids=torch.tensor([[1]])).logits[0, 0]
        else:
            logits = judge.model(input_ids=ids).logits[0, -1]
    return float(logits.softmax(0)[judge.yes].sum())


@kinds
def test_a_score_is_the_probability_of_yes_whatever_else_is_in_the_batch(kind, folders, tmp_path):
    asked = question(folders[kind], batch=3)
    found = ask(TEXTS, asked, cache=tmp_path, device=CPU, chunk=3)
    expected = [by_hand(folders[kind], text, asked.job) for text in TEXTS]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert len(set(found.tolist())) == len(TEXTS) and found.min() > 0 and found.max() < 1


@kinds
def test_yes_is_recognised_with_and_without_capital_and_space(kind, folders):
    judge = Judge.load(str(folders[kind]), CPU)
    said = {judge.tokenizer.decode([token]).strip() for token in judge.yes.tolist()}
    assert said and said <= {"yes", "Yes"} and "yes" in said
    assert judge.tokenizer.padding_side == "right"


def test_tokens_of_several_ways_count_together_and_parts_of_words_do_not():
    words = tokenizer("bytes")
    found = yes_tokens(words, "x").tolist()
    assert sorted(words.convert_ids_to_tokens(found)) == ["Yes", "yes", "ĠYes", "Ġyes"]
    assert len(words("YES")["input_ids"]) == 3  # Y is no yes

    class Without:
        unk_token_id = 0

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [0] if text == "yes" else [5, 6]}

        def decode(self, ids: list[int]) -> str:
            return "y"

    with pytest.raises(InputError, match="'x' has no single token for yes"):
        yes_tokens(Without(), "x")


@kinds
def test_a_long_text_is_cut_and_the_question_is_not(kind, folders, tmp_path):
    asked = question(folders[kind], max_tokens=4)
    long = ["good answer " * 50 + end for end in ("better", "no no no")]
    found = ask(long, asked, cache=tmp_path, device=CPU)
    assert float(found[0]) == float(found[1])
    judge = Judge.load(str(folders[kind]), CPU)
    first = judge.tokenizer(long[0], add_special_tokens=False)["input_ids"][:4]
    cut = judge.tokenizer.decode(first, skip_special_tokens=True)
    assert float(found[0]) == pytest.approx(by_hand(folders[kind], cut, asked.job), rel=1e-4)


def test_scores_are_cached_by_the_content_of_texts_and_model(folders, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(folders["llama"], folder)
    cache = tmp_path / "cache"
    asked = question(folder)
    first = ask(TEXTS, asked, cache=cache, device=CPU)
    loads: list[str] = []
    load = Judge.load

    def counted(name: str, device: torch.device) -> Judge:
        loads.append(name)
        return load(name, device)

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
    judge = load(str(moved), CPU)
    with torch.no_grad():
        judge.model.lm_head.weight.mul_(2)
    judge.model.save_pretrained(moved)
    changed = ask(TEXTS, Question(str(moved), asked.job), cache=cache, device=CPU)
    assert len(loads) == 3 and not torch.equal(changed, first)


def test_an_interrupted_pass_does_not_ask_twice(folders, tmp_path, monkeypatch):
    asked: list[str] = []
    probability = Judge.probability

    def stop(judge: Judge, texts: list[str], what: Question) -> torch.Tensor:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.extend(texts)
        return probability(judge, texts, what)

    monkeypatch.setattr(Judge, "probability", stop)
    with pytest.raises(KeyboardInterrupt):
        ask(TEXTS, question(folders["llama"]), cache=tmp_path, device=CPU, chunk=2)
    asked.clear()
    ask(TEXTS, question(folders["llama"]), cache=tmp_path, device=CPU, chunk=2)
    assert asked == TEXTS[2:]


def test_a_model_that_is_not_there_or_has_no_safetensors_is_refused(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"cannot be had .*give the id|give a local folder"):
        ask(TEXTS, Question(str(tmp_path / "none"), "x"), cache=tmp_path, device=CPU)
    folder = tmp_path / "pickled"
    shutil.copytree(folders["llama"], folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"cannot be had .*safetensors weights and tokenizer"):
        ask(TEXTS, question(folder), cache=tmp_path, device=CPU)


@pytest.mark.parametrize("name", ["batch", "max_tokens"])
def test_numbers_out_of_range_are_refused(name):
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        Question("m", "j", **{name: 0})


def test_the_prompt_asks_for_yes_or_no_about_the_text_and_the_job():
    prompt = askllm.PROMPT.format(text="TEXT", job="JOB")
    assert prompt.index("TEXT") < prompt.index("JOB") < prompt.index("yes") < prompt.index("no\n")
