"""The command, called within the test's process (seconds less of imports) or in one of its own."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from bads_ppl.data import Data
from inference.askllm import PROMPT
from inference.run import main
from inference.tasks import Task
from inference.writing import Writing

SMALL = (
    "data.source=digits",
    "steps=6",
    "burn_in=2",
    "thinning=2",
    "evaluate_every=2",
    "chains=1",
    "sampler.train_batch=20",
    "sampler.meta_batch=10",
)
"""The smallest run that makes draws, evaluations and snapshots."""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def run_here(*arguments: str) -> Outcome:
    """`python -m inference.run` with these arguments, in this process."""
    out, err = io.StringIO(), io.StringIO()
    root = logging.getLogger()
    kept = sys.argv, warnings.formatwarning, list(root.handlers), root.level
    sys.argv = ["run.py", *arguments]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.argv, warnings.formatwarning = kept[:2]
        root.handlers[:], root.level = kept[2:]
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    return SMALL


@pytest.fixture(scope="session")
def call() -> Callable[..., Outcome]:
    """Calls the command with these arguments and no others."""
    return run_here


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Calls the command at the smallest size that works, with further options.

    Its plots are not drawn, which would be a third of the time; `call` and `finished` draw.
    """
    monkeypatch.setattr("bads_ppl.plots.save", lambda figure, path: Path(path).touch())
    return lambda *options: run_here(*SMALL, *options)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `python -m inference.run` as a process of its own; none outlives the test."""
    processes: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "inference.run", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def finished(shared: Callable[[str, Callable[[Path], None]], Path]) -> Callable[..., Path]:
    """The folder of a finished small run with these options; made once, so leave it as it is."""

    def find(*options: str) -> Path:
        def run(folder: Path) -> None:
            outcome = run_here(*SMALL, f"run_dir={folder}", *options)
            assert outcome.code == 0, outcome.err

        return shared(re.sub(r"[^\w.]+", "-", " ".join(["run", *sorted(options)])), run)

    return find


@pytest.fixture
def results() -> Callable[[Path], dict[str, Any]]:
    return lambda folder: json.loads((folder / "results.json").read_text())


def say(ids: torch.Tensor) -> list[str]:
    """Token ids (B, L) as texts of numbered words; 0 is padding."""
    return [" ".join(f"w{k}" for k in row if k) for row in ids.tolist()]


def numbers_to_write(lengths: Sequence[int], name: str, first: int) -> Data:
    """Sources of these lengths, each of consecutive numbers that none of the others has."""
    place = torch.arange(max(lengths))
    mask = (place < torch.tensor(lengths)[:, None]).long()
    ids = (10 * torch.arange(1, len(lengths) + 1)[:, None] + place) * mask
    inputs = {"ids": ids, "mask": mask}
    return Data(inputs, ids, first + torch.arange(len(lengths)), name=name)


@pytest.fixture
def writing_task() -> Callable[..., Task]:
    """Makes a task to write the numbers of each source in words, with these test sources.

    The loss is the mean absolute error of numbers, padding among them.
    """

    def make(lengths: Sequence[int] = (6, 4, 5), **options: Any) -> Task:
        train = numbers_to_write([4, 5, 4, 6], "train", 0)
        meta, test = numbers_to_write([5, 4], "meta", 10), numbers_to_write(lengths, "test", 20)
        sources = [f"source {row}" for row in range(len(lengths))]
        writing = Writing(say, sources, [[text] for text in say(test.target)], **options)
        return Task(
            "numbers",
            "made",
            train,
            meta,
            test,
            classes=0,
            groups={},
            high=(),
            sparsity=0.5,
            loss=lambda output, target: (output - target).abs().mean(1),
            scoring=writing,
        )

    return make


def small_tokenizer(kind: str, **special: str) -> Any:
    """Bytes (as Llama 3) or words with a sign for the space before them (as T5), which know yes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

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
    answers = "yes no Yes No answer answers good better yes a much longer and more careful answer"
    made.train_from_iterator([PROMPT, answers] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", **special)


@pytest.fixture(scope="session")
def judges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models to ask: a causal one whose tokenizer has no padding, and a sequence-to-sequence one.

    Leave them as they are: others read them.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    made = {name: tmp_path_factory.mktemp(name) for name in ("llama", "t5")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        words = small_tokenizer("bytes")
        causal = LlamaConfig(vocab_size=len(words), num_hidden_layers=2, **size)
        LlamaForCausalLM(causal).save_pretrained(made["llama"])
        words.save_pretrained(made["llama"])
        words = small_tokenizer("words", unk_token="<unk>", pad_token="<pad>")
        ids = {"decoder_start_token_id": 1, "pad_token_id": 1, "eos_token_id": 2}
        pairs = T5Config(
            vocab_size=len(words), d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2, **ids
        )
        T5ForConditionalGeneration(pairs).save_pretrained(made["t5"])
        words.save_pretrained(made["t5"])
    return made
