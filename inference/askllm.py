"""Asking a language model which texts are informative for a job (Ask-LLM; Sachdeva et al., 2024).

The model sees a text and a question, and a text's score is the probability that its next token is
"yes". Any causal or sequence-to-sequence model of `transformers` will do, by its id or from a local
folder; weights must be safetensors, and code that comes with a model is not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bads_ppl.errors import InputError
from inference.embeddings import folder_version
from inference.scores import Points, score_table
from models.pretrained import complete_model, find_model, read_config, read_tokenizer

YES = ("yes", "Yes", "YES", " yes", " Yes", " YES")
"""Ways to begin the answer; tokenizers differ in how they write them."""

PROMPT = """###
{text}
###
Above, between the lines of ###, is one example of the data that a model could be trained on. Would
training on it help the model with {job}? An informative example is correct, clearly written, and \
like what the job needs.
Options:
- yes
- no
Answer:"""


@dataclass(frozen=True)
class Question:
    """Who is asked, and about what.

    Attributes:
        model: id or local folder of a language model.
        job: what an example should be informative for, in words.
        batch: texts per forward pass, at least 1.
        max_tokens: tokens of a text that are shown, at least 1; longer ones are cut.

    Raises:
        InputError: for numbers out of range.
    """

    model: str
    job: str
    batch: int = 8
    max_tokens: int = 512

    def __post_init__(self) -> None:
        for name in ("batch", "max_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")


def ask(
    texts: Sequence[str],
    question: Question,
    *,
    cache: Path,
    device: torch.device,
    chunk: int = 256,
    progress: bool | None = None,
) -> Tensor:
    """P("yes") (N,) in [0, 1] for each text, from the cache or computed and put there.

    What is cached is found by the content of the texts and of the model's files.

    Args:
        texts: the N texts.
        question: who is asked about what.
        cache: folder of score tables.
        device: where the model runs.
        chunk: texts between two writes.
        progress: show a progress bar; None: when standard error is a terminal.

    Raises:
        InputError: if the model cannot be had, lacks weights, or has no token for yes.
    """
    folder = find_model(question.model)
    about = {
        "model": folder_version(folder),
        "prompt": PROMPT,
        "job": question.job,
        "max_tokens": question.max_tokens,
    }
    judge: list[Judge] = []  # loaded once there is something to score

    def compute(rows: Tensor) -> Tensor:
        if not judge:
            judge.append(Judge.load(folder, device))
        return judge[0].probability([texts[row] for row in rows.tolist()], question)

    return score_table(
        cache,
        "askllm",
        Points.of_texts(texts),
        compute,
        about,
        chunk=chunk,
        progress=progress,
    )


@dataclass(frozen=True)
class Judge:
    """A language model with its tokenizer.

    Attributes:
        model: in eval mode.
        tokenizer: pads on the right.
        yes: (K,) ids of the tokens with which the answer yes begins.
    """

    model: Any
    tokenizer: Any
    yes: Tensor

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Judge:
        """The model in a folder, in the precision that it was saved in.

        Raises:
            InputError: if it cannot be read, lacks weights, or has no token for yes.
        """
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        paired = read_config(folder).is_encoder_decoder
        kind = AutoModelForSeq2SeqLM if paired else AutoModelForCausalLM
        model = complete_model(kind, folder, dtype="auto")
        tokenizer = read_tokenizer(folder)
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:  # never seen: padding is masked
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        return cls(model.to(device).eval(), tokenizer, yes_tokens(tokenizer, folder).to(device))

    @torch.no_grad()
    def probability(self, texts: Sequence[str], question: Question) -> Tensor:
        """P("yes") (N,) for each text."""
        shown = [self._cut(text, question.max_tokens) for text in texts]
        prompts = [PROMPT.format(text=text, job=question.job) for text in shown]
        order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))  # little to pad
        found = torch.empty(len(prompts))
        for start in range(0, len(order), question.batch):
            places = order[start : start + question.batch]
            logits = self._next([prompts[k] for k in places]).float()
            found[places] = logits.softmax(1)[:, self.yes].sum(1).cpu()
        return found

    def _cut(self, text: str, tokens: int) -> str:
        """The text's first tokens, so that the question is never cut off."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= tokens:
            return text
        short: str = self.tokenizer.decode(ids[:tokens], skip_special_tokens=True)
        return short

    def _next(self, prompts: list[str]) -> Tensor:
        """Logits (B, V) of the first token of the answers."""
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.model.device)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if self.model.config.is_encoder_decoder:
            start = torch.full_like(ids[:, :1], self.model.config.decoder_start_token_id)
            output = self.model(input_ids=ids, attention_mask=mask, decoder_input_ids=start)
            logits: Tensor = output.logits[:, 0]
            return logits
        last = mask.sum(1) - 1
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        return logits[torch.arange(len(ids), device=ids.device), last]


def yes_tokens(tokenizer: Any, folder: Path) -> Tensor:
    """Ids (K,) of the single tokens that say yes, with or without a capital or a space before.

    Raises:
        InputError: if the tokenizer has none.
    """
    found = set()
    for way in YES:
        ids = tokenizer(way, add_special_tokens=False)["input_ids"]
        if len(ids) > 1 and tokenizer.decode(ids[:1]).strip() == "":
            ids = ids[1:]  # the space is a token of its own
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            found.add(ids[0])
    if not found:
        raise InputError(f"model {folder} has no single token for yes: take another language model")
    return torch.tensor(sorted(found))
