"""Texts that are written and scored: their order, several references, what is refused."""

from __future__ import annotations

import pytest
import torch
from sacrebleu import corpus_bleu, corpus_chrf
from torch import nn

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from inference.writing import Writing

REFERENCES = [
    ["the cat sat on the mat", "a cat was sitting on a mat", "on the mat there sat a cat"],
    ["Alan Bean was born in Wheeler , Texas"],
    ["the airport of Aarhus serves the city of Aarhus", "Aarhus is served by Aarhus Airport"],
]


class Echo(nn.Module):
    """Writes its sources' ids back, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[list[int]] = []
        self.options: set[tuple[int, int]] = set()
        self.modes: set[bool] = set()

    def generate(self, ids, mask, *, beams: int = 1, max_tokens: int) -> torch.Tensor:
        self.lengths.append(mask.sum(1).tolist())
        self.options.add((beams, max_tokens))
        self.modes.add(self.training)
        return ids


def first_ids(ids: torch.Tensor) -> list[str]:
    return [str(row[0]) for row in ids.tolist()]


def entries(lengths: list[int]) -> Data:
    """Sources of these lengths, whose ids are all 70 and the number of their row."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = (70 + torch.arange(len(lengths))[:, None]) * mask
    return Data({"ids": ids, "mask": mask}, torch.zeros(len(lengths)), name="test")


def writing(count: int = 5, **options) -> Writing:
    return Writing(first_ids, ["a source"] * count, [["a reference"]] * count, **options)


def of_references() -> Writing:
    return Writing(first_ids, ["a source"] * len(REFERENCES), REFERENCES)


# writing


def test_texts_stand_in_the_order_of_the_rows_though_like_lengths_go_through_together():
    network, test = Echo(), entries([6, 1, 5, 2, 4])
    found = writing(batch=2, beams=3, max_tokens=9).write(network, test, torch.tensor([4, 0, 3, 1]))
    assert found == ["74", "70", "73", "71"]
    assert network.lengths == [[1, 2], [4, 6]]
    assert network.options == {(3, 9)}


def test_a_network_writes_in_eval_mode_and_is_left_in_its_own():
    network, one = Echo(), writing()
    assert len(one.write(network, entries([2] * 5), one.every())) == 5
    assert network.modes == {False} and network.training


def test_nothing_is_written_for_no_rows():
    network, one = Echo(), writing(curve=0)
    assert one.write(network, entries([2] * 5), one.some()) == [] and network.lengths == []


@pytest.mark.parametrize(
    ("count", "curve", "rows"),
    [
        (10, 4, [0, 3, 6, 9]),
        (10, 3, [0, 4, 9]),
        (10, 1, [0]),
        (10, 0, []),
        (4, 4, [0, 1, 2, 3]),
        (4, 100, [0, 1, 2, 3]),
        (1, 100, [0]),
    ],
)
def test_rows_for_the_curve_are_evenly_spaced_over_the_test_set(count, curve, rows):
    one = writing(count, curve=curve)
    assert one.some().tolist() == rows and one.some().dtype == torch.int64
    assert one.every().tolist() == list(range(count))


# scores


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1]])
def test_scores_are_sacrebleu_s_for_entries_with_different_numbers_of_references(rows):
    """A reference that is given again changes nothing, so each entry can be given six."""
    texts = [
        "the cat was sitting on the mat",
        "Alan Bean was born in Texas",
        "the city of Aarhus is served by Aarhus Airport",
    ]
    texts = [texts[row] for row in rows]
    streams = [[(REFERENCES[row] * 6)[k] for row in rows] for k in range(6)]
    found = of_references().score(texts, torch.tensor(rows))
    assert found == {
        "bleu": pytest.approx(corpus_bleu(texts, streams).score),
        "chrf": pytest.approx(corpus_chrf(texts, streams).score),
    }
    assert 20 < found["bleu"] < 90 and 20 < found["chrf"] < 99
    firsts = [[REFERENCES[row][0] for row in rows]]
    if rows != [1]:  # it has one alone
        assert found["bleu"] > corpus_bleu(texts, firsts).score + 1
        assert found["chrf"] > corpus_chrf(texts, firsts).score + 1


@pytest.mark.parametrize("which", [0, 1, 2])
def test_copies_of_any_of_the_references_score_100(which):
    one = of_references()
    texts = [several[which % len(several)] for several in REFERENCES]
    assert one.score(texts, one.every()) == {
        "bleu": pytest.approx(100),
        "chrf": pytest.approx(100),
    }
    other = one.score(texts[::-1], one.every())
    assert other["bleu"] < 50 and other["chrf"] < 50


def test_bleu_is_the_one_by_hand():
    """Of 5 words 4 are in the reference, of 4 pairs 3, of 3 triples 2, of 2 fours 1."""
    one = Writing(first_ids, ["s"], [["a b c d e f"]])
    found = one.score(["a b c d x"], torch.tensor([0]))
    product = (4 / 5) * (3 / 4) * (2 / 3) * (1 / 2)
    brevity = torch.tensor(1 - 6 / 5).exp()
    assert found["bleu"] == pytest.approx(100 * float(brevity) * product**0.25)


def test_no_rows_have_no_scores():
    assert of_references().score([], torch.arange(0)) == {}


# refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams must be at least 1, got 0"),
        ({"max_tokens": 1}, "max_tokens must be at least 2, got 1"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"curve": -1}, "curve must be at least 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        writing(**options)


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ([["a"], [], ["b"], []], r"got 4 lists for 4 points, empty at \[1, 3\]: leave out"),
        ([["a"], ["b"], ["c"]], r"got 3 lists for 4 points, empty at \[\]"),
        ([["a"]] * 5, "got 5 lists for 4 points"),
    ],
)
def test_points_without_references_are_refused(references, message):
    with pytest.raises(InputError, match=f"every test point must have a reference, {message}"):
        Writing(first_ids, ["a source"] * 4, references)
