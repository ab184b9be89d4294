"""The figures and tables on language: WebNLG, and instruction tuning."""

from __future__ import annotations

from functools import partial

from inference.benchmark_files import BENCHMARKS
from inference.reproduce import figures
from inference.reproduce.cases import METHODS, Case, Key, beta, every_method
from inference.reproduce.claims import Claim, ahead, ahead_in_weight, level
from inference.reproduce.settings import llm, webnlg
from inference.reproduce.target import (
    BETAS,
    PLAIN,
    UNPAPERED,
    Target,
    of_both_programs,
    on,
    turned,
    weights_by_group,
)

FULL, CONTROLLED = webnlg("full"), webnlg("controlled")
INSTRUCTIONS = tuple(llm(name) for name in BENCHMARKS)

BUILT = (
    "At size=small a T5 of 1.2 million parameters, trained on the spot, stands for T5-small; the "
    "release is the one that is there, of 2017 or of 2020 as in the paper (docs/webnlg.md)."
)


def _figure_2_webnlg() -> Target:
    setting = FULL.name
    bads, dup_meta = on(setting, "bads", "dup_meta")
    rest = on(setting, "mixing", "meta_only", "random_select", "blo", "cds", "classact")
    return Target(
        "fig2_webnlg",
        "Test BLEU over steps: WebNLG, unseen domains",
        every_method(FULL, without=("bads_joint", *UNPAPERED)),
        figures.curves,
        (
            Claim(
                "BADS ends about 2 points of BLEU ahead of the duplicated meta set.",
                level(setting, ahead(bads, [dup_meta], 1.0, 3.0)),
                "about: 1 to 3",
            ),
            Claim(
                "BADS ends about 5 points of BLEU ahead of the rest.",
                level(setting, ahead(bads, rest, 3.0, 7.0)),
                "about: 3 to 7",
            ),
            Claim("BADS ends ahead of every other method.", ahead(bads, [dup_meta, *rest])),
        ),
        (BUILT, "AskLLM-O takes a language model (method=askllm)."),
    )


def _figure_9_webnlg() -> Target:
    return Target(
        "fig9_webnlg",
        "Beta, the share of the train set to select: WebNLG",
        turned([CONTROLLED], [beta(value) for value, _, _ in BETAS]),
        partial(figures.weights, columns=1 + len(BETAS)),
        [
            claim
            for value, what, predicate in BETAS
            for claim in of_both_programs(
                f"Beta {value:g} {what}", CONTROLLED, f"beta{value:g}", predicate
            )
        ],
        (BUILT,),
    )


def _figure_12() -> Target:
    setting = CONTROLLED.name
    bads, *others = on(setting, "bads", "blo", "cds")
    return Target(
        "fig12",
        "Test BLEU over steps: WebNLG, a close domain and a far one",
        every_method(CONTROLLED, without=("bads_joint", *UNPAPERED)),
        figures.curves,
        (
            Claim(
                "BADS ends more than 10 points of BLEU ahead of BLO and CDS.",
                level(setting, ahead(bads, others, 10.0)),
            ),
            Claim("BADS ends ahead of BLO and CDS.", ahead(bads, others)),
        ),
        (BUILT,),
    )


TUNED = (
    "At size=small a Llama of a million parameters, trained on the spot, stands for OpenLLaMA 3B, "
    "and a few hundred examples of each source for all: what it answers is a guess. FLAN and CoT "
    "are one source, flan_cot.",
)


DOTS = "Dot: mean over seeds; bar: 95 % interval."


def _table_2() -> Target:
    claims = []
    for setting in INSTRUCTIONS:
        bads, *others = on(setting.name, "bads", *PLAIN, "cds", "classact")
        (askllm,) = on(setting.name, "askllm")
        claims += [
            Claim(f"{setting.title}: BADS ahead of all but AskLLM-O.", ahead(bads, others)),
            Claim(f"{setting.title}: AskLLM-O ahead of BADS.", ahead(askllm, [bads])),
        ]
    return Target(
        "table2",
        "Instruction tuning: methods by benchmarks",
        every_method(*INSTRUCTIONS, without=("bads_joint", "rho_loss")),
        figures.ends,
        claims,
        (
            *TUNED,
            "AskLLM-O takes a language model that can answer: it is run at size=paper only.",
        ),
        caption=DOTS,
    )


def _table_4() -> Target:
    return Target(
        "table4",
        "Instruction tuning: mean weights by source",
        [Case(setting, METHODS["bads"]) for setting in INSTRUCTIONS],
        figures.sources,
        [
            Claim(
                f"{setting.title}: BADS weighs {high} more than FLAN and CoT.",
                ahead_in_weight(Key(setting.name, "bads"), high, "flan_cot"),
            )
            for setting in INSTRUCTIONS
            for high in ("oasst1", "dolly")
        ],
        TUNED,
        caption=DOTS,
    )


LANGUAGE = {
    target.name: target
    for target in (
        _figure_2_webnlg(),
        _figure_9_webnlg(),
        _figure_12(),
        weights_by_group("fig13_webnlg", CONTROLLED, "the close domain", "the far one"),
        _table_2(),
        _table_4(),
    )
}
