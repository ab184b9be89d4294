"""The task `llm`: instruction data from several sources, and a few examples of what is wanted.

A causal language model is fine-tuned on the responses, whole or by an adapter, and every example
gets a weight. What to be good at is a benchmark (MMLU, ARC, HellaSwag), or what a file of checked
examples shows. Where no model can be had, a small Llama is made on the spot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from bads_ppl.errors import InputError
from inference.benchmark_files import BENCHMARKS
from inference.benchmark_scores import check, evaluate
from inference.causal_pretraining import pretrained_causal
from inference.conversation_sets import Long, conversation_sets
from inference.embeddings import folder_version
from inference.instruction_sets import (
    Reading,
    Target,
    read_sources,
    read_target,
    shuffled,
    thinned,
    without_targets,
)
from inference.instructions import (
    Conversation,
    Instructions,
    OnError,
    find_examples,
    repeated,
)
from inference.llm_outputs import Delivery, Row, Selected
from inference.made_instructions import MADE, made_instructions
from inference.next_tokens import Ask, NextTokens
from inference.options import names
from inference.sources import SPLITS
from inference.tasks import Task
from inference.text_files import Empty
from models.chat import Chat, build_folder
from models.language import sequence_loss, token_loss
from models.pretrained import find_model, read_tokenizer

SOURCES = ("auto", "files", "generated")
LOSSES = {"token": token_loss, "sequence": sequence_loss}
SHARE = 0.2
"""Share of the train examples to select where nothing is known of them."""


def llm(
    *,
    root: str,
    source: str,
    seed: int,
    cache: Path,
    device: torch.device | None = None,
    split: str = "test",
    train: str | None = None,
    meta: str | None = None,
    test: str | None = None,
    sources: Mapping[str, str] | None = None,
    target: str | None = None,
    meta_count: int | None = None,
    per_source: int | None = None,
    shuffle: Sequence[str] = (),
    remove_meta: bool = False,
    on_error: OnError = "refuse",
    empty: Empty = "refuse",
    model: str | None = None,
    size: Literal["tiny", "small"] = "tiny",
    vocabulary: int = 2000,
    pretraining: int = 2000,
    max_tokens: int = 256,
    long: Long = "cut",
    loss: Literal["token", "sequence"] = "token",
    tested: int = 300,
    questions: int | None = 0,
    batch: int = 32,
    selected: Selected = "top",
) -> Task:
    """Instructions to weigh and to learn from.

    Args:
        root: folder of the examples and the benchmarks.
        source: "auto"; "files" never comes to the made-up set; "generated" takes it.
        seed: draws meta and validation examples, those of `per_source`, and what is shuffled.
        cache: folder of built models.
        device: where a built one is trained; None: the CPU.
        split: "validation" reports on half of the validation examples and chooses by the others.
        train: a file of instructions, the only source.
        meta: a file of checked examples, in place of `target`.
        test: a file of test examples; None: a quarter of the meta file is set aside.
        sources: name to file, folder or name of an example; None: the examples that root has.
        target: a benchmark, or an example with a test split; None, without `meta`: mmlu.
        meta_count: meta examples (of MMLU: of each subject), and as many to choose the network by.
        per_source: most examples of a source; None: all.
        shuffle: sources whose responses are shuffled, as trouble to find.
        remove_meta: leave meta examples that stand in a train source out of it.
        on_error: what becomes of malformed lines.
        empty: what becomes of rows with an empty prompt or response.
        model: id or local folder of a causal language model; None or "built": one made on the spot.
        size: of a built model.
        vocabulary: most tokens of a built model.
        pretraining: steps in which a built model learns to copy, and as many in which it learns the
            language of conversations that are not weighed or tested on, or of the train examples
            where there are no others; 0: none.
        max_tokens: of a conversation that the network is shown.
        long: what becomes of longer train and meta conversations; others are cut.
        loss: "token": mean over a response's tokens; "sequence": their sum, the likelihood of (3).
        tested: most test examples that next tokens are told of, evenly spaced.
        questions: test questions of a benchmark that lm-eval asks the network that is kept,
            evenly spaced; None: all.
        batch: examples that go through the network together in evaluations.
        selected: how the share `sparsity` is selected, see `Delivery`.

    Raises:
        InputError: for files that cannot be used, names that do not exist, impossible sizes, or a
            model that cannot be had.
    """
    _check(
        source,
        split,
        long=long,
        loss=loss,
        selected=selected,
        pretraining=pretraining,
        tested=tested,
    )
    reading = Reading(on_error, empty)
    place = Path(root)
    named = _named(train, sources)
    made = source == "generated" or (
        source == "auto" and not (named or meta or target) and not find_examples(place)
    )
    aimed = None if made else target if target or meta else "mmlu"
    if questions != 0:
        _check_asked(aimed, questions, split)
    if made:
        if named or meta or test or target:
            raise InputError("data.source=generated takes no files: leave out sources and target")
        offered, aim = made_instructions()
        per_source, name = None, MADE
    else:
        aim = read_target(
            place,
            aimed,
            meta=meta,
            test=test,
            count=meta_count,
            seed=seed,
            reading=reading,
        )
        offered = read_sources(place, named, reading)
        name = f"instructions for {aim.name}"
    whole, notes = without_targets(offered, aim, remove=remove_meta)
    chosen = [thinned(one, per_source, seed) for one in whole]
    chosen = _with_trouble(chosen, shuffle, seed)
    left_out = [note for one in whole for note in one.notes(f"source {one.source!r}")]
    notes = (*left_out, *aim.warnings, *notes)
    if made:
        notes = (
            f"dataset is {MADE!r}, made on the spot: it shows that things run, and its numbers "
            "mean nothing elsewhere",
            *notes,
        )
    on_the_spot = model in (None, "built")
    others = _others(place, named, reading, aim) if on_the_spot and not made else []
    folder, pretrained, told = _model(
        model, size, vocabulary, pretraining, whole, others, made, cache, device, max_tokens
    )
    base = None if on_the_spot else str(model)
    if base is not None and Path(base).is_dir():
        base = str(Path(base).absolute())
    chat = Chat(folder, max_tokens)
    return _of_conversations(
        name,
        chosen,
        aim,
        chat,
        split=split,
        tested=tested,
        batch=batch,
        long=long,
        loss=loss,
        notes=(*notes, *told),
        facts={"model": str(model or "built"), "pretrained": pretrained, "target": aim.name},
        network={"folder": str(folder), "pretrained": pretrained},
        deliver=partial(Delivery, chat=chat, base=base, selected=selected, seed=seed),
        ask=None if questions == 0 else partial(_ask, folder, str(aimed), place, questions, batch),
    )


def _check_asked(target: str | None, questions: int | None, split: str) -> None:
    if split != "test":
        raise InputError(
            f"task.data.questions={questions} are test questions, got split={split}: leave them at "
            "0 where settings are chosen"
        )
    if target not in BENCHMARKS:
        raise InputError(
            f"task.data.questions={questions} are of a benchmark, got task.target={target}: take "
            f"one of {', '.join(BENCHMARKS)}, or leave questions at 0"
        )
    if questions is not None and questions < 0:
        raise InputError(f"task.data.questions must be at least 0, got {questions}")
    check([target])


def _ask(
    folder: Path, name: str, root: Path, questions: int | None, batch: int, network: Any
) -> dict[str, float]:
    """What lm-eval says of a network on a benchmark: shares of questions answered right."""
    model = (network.model, read_tokenizer(folder))
    score = evaluate(model, [name], root=root, source="files", limit=questions, batch=batch)[name]
    found = {"benchmark": score.accuracy, "benchmark_normalised": score.normalised}
    return {key: value for key, value in found.items() if value is not None}


def _check(source: str, split: str, **options: Any) -> None:
    known = {
        "data.source": (source, SOURCES),
        "split": (split, SPLITS),
        "task.data.long": (options["long"], ("cut", "drop", "refuse")),
        "task.data.loss": (options["loss"], LOSSES),
        "task.data.selected": (options["selected"], ("top", "sample")),
    }
    for name, (value, several) in known.items():
        if value not in several:
            raise InputError(f"{name} must be one of {', '.join(several)}, got {value!r}")
    for name, least in (("pretraining", 0), ("tested", 1)):
        if options[name] < least:
            raise InputError(f"task.data.{name} must be at least {least}, got {options[name]}")


def _named(train: str | None, sources: Mapping[str, str] | None) -> dict[str, str]:
    if train is not None and sources:
        raise InputError(
            f"got both data.train={train} and task.data.sources: leave one of them out"
        )
    return {Path(train).name.split(".")[0]: train} if train is not None else dict(sources or {})


def _with_trouble(
    sources: Sequence[Instructions], shuffle: Sequence[str], seed: int
) -> list[Instructions]:
    wanted = names(shuffle)
    there = [one.source for one in sources]
    unknown = [name for name in wanted if name not in there]
    if unknown:
        raise InputError(
            f"task.data.shuffle names {unknown}, which are no sources: they are {', '.join(there)}"
        )
    return [shuffled(one, seed) if one.source in wanted else one for one in sources]


def _others(
    root: Path, named: Mapping[str, str], reading: Reading, aim: Target
) -> list[Conversation]:
    """Conversations of the examples that are no sources, nor the target's: to learn from."""
    if not named:
        return []
    rest = {name: name for name in find_examples(root) if name not in named.values()}
    found = read_sources(root, rest, reading) if rest else []
    whole = [one for source in found for one in source.conversations]
    known = set(repeated(whole, [*aim.meta, *aim.validation, *aim.test]))
    return [one for place, one in enumerate(whole) if place not in known]


# ------------------------------------------------------------------------------------ the model


def _model(
    name: str | None,
    size: Literal["tiny", "small"],
    vocabulary: int,
    pretraining: int,
    sources: Sequence[Instructions],
    others: Sequence[Conversation],
    made: bool,
    cache: Path,
    device: torch.device | None,
    max_tokens: int,
) -> tuple[Path, bool, tuple[str, ...]]:
    """The model's folder, whether it has weights, and what the reader must know."""
    if name not in (None, "built"):
        return find_model(str(name)), True, ()
    own = [one for source in sources for one in source.conversations]
    texts = [message.content for one in (*own, *others) for message in one]
    folder = build_folder(cache, texts, size, vocabulary)
    how, pretrained = "without pretraining", False
    if pretraining:
        learned = [] if made else list(others) or own
        folder = pretrained_causal(
            folder,
            learned,
            steps=pretraining,
            max_tokens=max_tokens,
            device=device or torch.device("cpu"),
        )
        how, pretrained = "that was taught to copy", True
        if learned:
            what = "other conversations" if others else "conversations, those to be weighed"
            how += f", and trained on {len(learned):,} {what}"
    note = (
        f"the network is a Llama of size {size} {how}: its numbers cannot be compared with those "
        "of a language model (task.model names one)"
    )
    return folder, pretrained, (note,)


# --------------------------------------------------------------------------------- the task


def _of_conversations(
    name: str,
    sources: Sequence[Instructions],
    aim: Target,
    chat: Chat,
    *,
    split: str,
    tested: int,
    batch: int,
    long: Long,
    loss: str,
    notes: Sequence[str],
    facts: Mapping[str, Any],
    network: Mapping[str, Any],
    deliver: Callable[[Sequence[Row]], Delivery],
    ask: Ask | None,
) -> Task:
    """The task of these conversations."""
    rows = [
        (source.source, own, one)
        for source in sources
        for own, one in zip(source.ids, source.conversations, strict=True)
    ]
    validation, test = aim.validation, aim.test
    if split == "validation":
        if len(validation) < 2:
            raise InputError(
                f"split=validation takes at least 2 validation examples, got {len(validation)}: "
                "raise task.meta_count, or give more checked examples"
            )
        validation, test = validation[::2], validation[1::2]
    step = max(1, -(-len(test) // tested))
    parts = {
        "train": [one for _, _, one in rows],
        "meta": aim.meta,
        "validation": validation,
        "test": test[::step],
    }
    names = [f"conversation {own!r} of source {source}" for source, own, _ in rows]
    sets, places, told = conversation_sets(chat, parts, long, names)
    rows = [rows[place] for place in places]
    of = [source for source, _, _ in rows]
    version = folder_version(Path(network["folder"]))
    return Task(
        "llm",
        name,
        sets["train"],
        sets["meta"],
        sets["test"],
        classes=0,
        groups={name: torch.tensor([one == name for one in of]) for name in dict.fromkeys(of)},
        high=(),
        sparsity=SHARE,
        warnings=(*notes, *told),
        texts=[_in_words(one) for _, _, one in rows],
        columns={"example": [own for _, own, _ in rows]},
        facts={
            **facts,
            "model_version": version,
            "sizes": {key: len(one) for key, one in sets.items()},
        },
        loss=LOSSES[loss],
        network=network,
        scoring=NextTokens(sets["validation"], batch, ask),
        depends={"model": version, "pretrained": network["pretrained"], "loss": loss},
        probe=128,  # of long rows
        delivery=deliver(rows),
    )


def _in_words(one: Conversation) -> str:
    return "\n".join(f"{message.role}: {message.content}" for message in one)
