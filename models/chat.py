"""Conversations as token ids of causal language models, with what counts of them marked.

Conversations are laid out by the chat template of the model's tokenizer, or by a plain one where it
has none. What counts is what the model has to say: the assistant's messages, and the token that
ends each. Where no pretrained model can be had, `build_folder` makes the folder of one without
weights: a tokenizer that was trained on the texts, and the configuration of a Llama (Touvron et
al., 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from jinja2 import TemplateError
from torch import Tensor

from bads_ppl.errors import InputError
from models.language import IGNORED
from models.pretrained import read_config, read_tokenizer
from models.tokens import built, known, padded, special, trained_on, write_config, write_tokenizer

SPECIAL = ("<|padding|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
"""Special tokens of a tokenizer that is made here, ids 0 to 4."""

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Its chat template."""

PLAIN = (
    "{% for message in messages %}"
    "{{ message['role'].capitalize() + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""Stands in for the template of a tokenizer that has none."""

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4,
             "num_attention_heads": 4},
    "small": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
              "num_attention_heads": 8},
}  # fmt: skip
"""Sizes of a Llama: 1 million parameters with a vocabulary of 2000, 29 million with one of 8000."""

POSITIONS = 2048
"""Tokens that a Llama made here can be shown."""

Chatted = Sequence[tuple[str, str]]
"""Role and content of each message of a conversation; the last one is the assistant's."""


@dataclass(frozen=True)
class Encoded:
    """Conversations as token ids.

    Attributes:
        ids: of each conversation, at most as many as the model is shown.
        labels: the same ids where they count, `IGNORED` elsewhere.
        cut: places of the conversations that were longer.
        headless: places of those of them whose beginning is cut, too.
    """

    ids: list[list[int]]
    labels: list[list[int]]
    cut: list[int]
    headless: list[int]

    def __len__(self) -> int:
        return len(self.ids)


class Chat:
    """Conversations to token ids.

    Args:
        folder: of the model.
        max_tokens: most tokens of a conversation that the model is shown. A longer one loses its
            end, and where less than half of them would then be of responses, and there are more,
            the beginning of its prompt.

    Attributes:
        padding: id of the padding token, or where there is none of the end token. It is masked.
        vocabulary: tokens that the model knows.

    Raises:
        InputError: if max_tokens is below 2 or more than the model takes, the tokenizer cannot be
            read, has no end token, or knows more tokens than the model.
    """

    def __init__(self, folder: Path, max_tokens: int) -> None:
        self._tokenizer = read_tokenizer(folder)
        self._folder = folder
        lengths = (
            self._tokenizer.model_max_length,  # 1e30 where it is not known
            getattr(read_config(folder).get_text_config(), "max_position_embeddings", None),
        )
        most = min(length for length in (*lengths, 10**9) if length)
        if not 2 <= max_tokens <= most:
            raise InputError(
                f"max_tokens must be from 2 to {most} for model {folder}, got {max_tokens}: what a "
                "conversation has beyond it is cut"
            )
        self.max_tokens = max_tokens
        end = special(folder, "end", self._tokenizer.eos_token_id)
        own = self._tokenizer.pad_token_id
        self.padding: int = end if own is None else own
        self.vocabulary: int = known(folder, self._tokenizer)
        self._specials = [
            str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special
        ]
        if self._tokenizer.chat_template is None:
            begun = self._tokenizer("a")["input_ids"][:1] == [self._tokenizer.bos_token_id]
            self._tokenizer.chat_template = ("{{ bos_token }}" if begun else "") + PLAIN

    def encode(
        self, conversations: Sequence[Chatted], names: Sequence[str] | None = None
    ) -> Encoded:
        """Token ids of conversations, and which of them count.

        Args:
            conversations: the role and content of each message.
            names: what error messages call each; None: by its number, from 1.

        Raises:
            InputError: if the template cannot lay a conversation out, or not so that what a model
                is shown before a response is the beginning of the whole, or a conversation does
                not end with the assistant, or its response has no token.
        """
        if names is None:
            names = [f"conversation {place + 1}" for place in range(len(conversations))]
        laid_out = [self._parts(*named) for named in zip(names, conversations, strict=True)]
        tokens = iter(self._tokens([text for parts in laid_out for text in parts]))
        found = Encoded([], [], [], [])
        for place, parts in enumerate(laid_out):
            ids, labels = self._joined(parts, tokens)
            start = next((k for k, label in enumerate(labels) if label != IGNORED), None)
            if start is None:
                raise InputError(
                    f"the response of {names[place]} has no token, so nothing can be learned from "
                    "it: leave it out"
                )
            skipped = self._skipped(start, len(ids))
            kept = slice(skipped, skipped + self.max_tokens)
            found.ids.append(self._begun(ids[kept], ids[0]))
            found.labels.append(labels[kept])
            found.cut.extend([place] * (len(ids) > self.max_tokens))
            found.headless.extend([place] * (skipped > 0))
        return found

    def _skipped(self, start: int, length: int) -> int:
        """How many tokens to leave out at the beginning of a conversation.

        Args:
            start: where its first response starts.
            length: of it all.
        """
        responses = min(length - start, self.max_tokens // 2)  # at least so much of them is shown
        return max(0, start + responses - self.max_tokens)

    def _begun(self, ids: list[int], first: int) -> list[int]:
        """Token ids that begin with the token that all conversations begin with, if any does."""
        return [first, *ids[1:]] if first == self._tokenizer.bos_token_id else ids

    def pad(self, encoded: Encoded) -> dict[str, Tensor]:
        """Conversations as tensors, int64, padded on the right.

        Returns:
            `ids` and `mask`, 1 for tokens and 0 for padding, and `labels`, all (B, T), where T is
            the length of the longest.

        Raises:
            InputError: if there are none.
        """
        if not len(encoded):
            raise InputError("there are no conversations to pad: give at least one")
        return {
            "ids": padded(encoded.ids, self.padding),
            "mask": padded([[1] * len(row) for row in encoded.ids], 0),
            "labels": padded(encoded.labels, IGNORED),
        }

    # --------------------------------------------------------------------------------- layout

    def _parts(self, name: str, conversation: Chatted) -> list[str]:
        """Beginnings of a conversation, each as long as the last one or longer.

        They go up to where a response starts, up to where it ends, and so on; then the whole.
        """
        roles = [role for role, _ in conversation]
        if not conversation or roles[0] == "assistant" or roles[-1] != "assistant":
            raise InputError(
                f"{name} must begin with a message of the user or system and end "
                f"with one of the assistant, got roles {roles}"
            )
        whole = self._rendered(name, conversation)
        found = [""]
        for place in (place for place, role in enumerate(roles) if role == "assistant"):
            before = self._rendered(name, conversation[:place], prompt=True)
            after = self._rendered(name, conversation[: place + 1])
            after = after[: self._end(after, len(before))]
            chain = (found[-1], before, after, whole)
            if not all(longer.startswith(text) for text, longer in pairwise(chain)):
                raise InputError(
                    f"the chat template of model {self._folder} lays message {place + 1} of "
                    f"{name} out differently by whether something follows, so that "
                    "what is learned would not be what the model has to say when it answers: give "
                    "each response as a conversation that ends with it, or change chat_template"
                )
            found += [before, after]
        return [*found[1:], whole]

    def _rendered(self, name: str, messages: Chatted, prompt: bool = False) -> str:
        try:
            found: str = self._tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise InputError(
                f"the chat template of model {self._folder} does not take the first "
                f"{len(messages)} messages of {name}, of roles "
                f"{[role for role, _ in messages]} ({' '.join(str(error).split())}): change the "
                "conversation or chat_template"
            ) from error
        return found

    def _end(self, text: str, start: int) -> int:
        """Where the response that starts at a place of a text and is its last one ends.

        That is behind the first of the special tokens, if any, that the text ends with. Other
        ones and white space behind it, such as a line break before the next message, do not count.
        """
        end, rest = len(text), text.rstrip()
        while token := next((token for token in self._specials if rest.endswith(token)), None):
            if len(rest) - len(token) < start:
                break
            end, rest = len(rest), rest.removesuffix(token).rstrip()
        return end

    # ------------------------------------------------------------------------------ token ids

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=False, truncation=False, verbose=False
        )["input_ids"]
        return found

    def _joined(self, parts: list[str], tokens: Iterator[list[int]]) -> tuple[list[int], list[int]]:
        """Token ids and labels of a conversation, given its beginnings and the tokens of each.

        Where a token of a longer one spans the end of the shorter one, what follows is taken by
        itself, as it is when the model answers.
        """
        ids: list[int] = []
        labels: list[int] = []
        done = ""
        for place, part in enumerate(parts):
            longer = next(tokens)
            if longer[: len(ids)] != ids:
                longer = ids + self._tokens([part[len(done) :]])[0]
            new = longer[len(ids) :]
            labels += new if place % 2 else [IGNORED] * len(new)
            ids, done = longer, part
        return ids, [IGNORED] * min(len(ids), 1) + labels[1:]  # nothing says what comes first

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer, with the template in use, into a folder that is there."""
        self._tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------- made of the texts


def train_tokenizer(texts: Sequence[str], vocabulary: int, folder: Path) -> None:
    """Train a tokenizer on texts and write its files into a folder that is there.

    Byte-pair encoding (Sennrich et al., 2016) of the bytes of texts, as GPT-2 has it (Radford et
    al., 2019): any text comes back as it was. The same texts give the same ids.

    Args:
        texts: to train on.
        vocabulary: most tokens; fewer where the texts do not support as many.
        folder: gets tokenizer.json and tokenizer_config.json.

    Raises:
        InputError: if there are no texts, or the vocabulary does not hold all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained_on(made, trainer, texts, "the special tokens and the 256 bytes")
    names = {"pad_token": SPECIAL[0], "eos_token": SPECIAL[1], "chat_template": TEMPLATE}
    write_tokenizer(made, names, folder)


def build_folder(
    cache: Path, texts: Sequence[str], size: Literal["tiny", "small"], vocabulary: int
) -> Path:
    """The folder of a Llama without weights for these texts, from the cache or made and put there.

    It has config.json and the files of a tokenizer that was trained on the texts, and goes by
    their content, the size and the vocabulary.

    Args:
        cache: folder of such folders.
        texts: what the messages say.
        size: one of `SIZES`.
        vocabulary: most tokens of the tokenizer.

    Raises:
        InputError: for an unknown size, or as `train_tokenizer` does.
    """
    if size not in SIZES:
        raise InputError(f"size of a built model must be one of {sorted(SIZES)}, got {size!r}")

    def fill(folder: Path) -> None:
        train_tokenizer(texts, vocabulary, folder)
        _write_config(folder, size)

    parts = (SIZES[size], POSITIONS, TEMPLATE, vocabulary)
    return built(cache, f"llama-{size}", parts, texts, fill)


def _write_config(folder: Path, size: str) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=len(read_tokenizer(folder)),
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **SIZES[size],
    )
    write_config(config, folder)
