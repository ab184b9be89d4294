"""Tables of scores: what they are about, that they are made once, and that a kill costs a chunk."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from inference.scores import Points, content_key, load_scores, locked, score_table


def data(size: int = 10, order: list[int] | None = None, shift: float = 0.0) -> Data:
    rows = torch.tensor(order) if order else torch.arange(size)
    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(0)) + shift
    return Data(x[rows], rows % 2, 100 + rows)


def double(rows: torch.Tensor) -> torch.Tensor:
    return 2.0 * rows


def refuse(rows: torch.Tensor) -> torch.Tensor:
    raise AssertionError(f"rows {rows.tolist()} are scored again")


def table(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def test_a_table_is_computed_in_chunks_once_and_read_from_then_on(tmp_path):
    seen: list[list[int]] = []

    def compute(rows):
        seen.append(rows.tolist())
        return double(rows)

    points = Points.of(data())
    found = score_table(tmp_path, "loss", points, compute, {"a": 1}, chunk=4)
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert found.tolist() == [2.0 * row for row in range(10)]
    again = score_table(tmp_path, "loss", points, refuse, {"a": 1}, chunk=3)
    assert torch.equal(again, found) and torch.equal(
        load_scores(table(tmp_path), "loss", points), found
    )
    assert not list(tmp_path.glob("*.parts"))


def test_a_row_of_values_per_point_is_kept_as_it_is(tmp_path):
    found = score_table(
        tmp_path, "e", Points.of(data()), lambda rows: torch.eye(10)[rows], {}, chunk=3
    )
    assert torch.equal(found, torch.eye(10))


def test_other_settings_points_inputs_or_names_are_another_table(tmp_path):
    makes = [
        ("loss", data(), {"a": 1}),
        ("loss", data(), {"a": 2}),
        ("gain", data(), {"a": 1}),
        ("loss", data(order=[1, 0, *range(2, 10)]), {"a": 1}),
        ("loss", data(shift=0.5), {"a": 1}),
    ]
    for k, (name, points, about) in enumerate(makes):
        score_table(tmp_path, name, Points.of(points), lambda rows, k=k: rows + k, about)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(makes)
    for k, (name, points, about) in enumerate(makes):
        assert float(score_table(tmp_path, name, Points.of(points), refuse, about)[0]) == k


def test_every_input_counts_however_many_there_are():
    many = torch.zeros(10_000, 1)
    other = many.clone()
    other[1] = 1.0  # not among the 4,096 that a checkpoint looks at
    y = torch.zeros(10_000, dtype=torch.int64)
    assert Points.of(Data(many, y)).content != Points.of(Data(other, y)).content


def test_keys_do_not_depend_on_the_order_of_settings():
    assert content_key({"a": 1, "b": {"c": 2, "d": 3}}) == content_key(
        {"b": {"d": 3, "c": 2}, "a": 1}
    )
    assert content_key({"a": 1}) != content_key({"a": 1.5})


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_pass_that_was_killed_goes_on_with_the_chunks_that_are_missing(how, tmp_path):
    points = Points.of(data())

    def killed(rows):
        if int(rows[0]) == 6:
            if how is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), how)
        return double(rows)

    def work():
        score_table(tmp_path, "loss", points, killed, {}, chunk=2)

    if how is None:
        with pytest.raises(KeyboardInterrupt):
            work()
    else:
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        process.join(30)
        assert process.exitcode == -how
    assert not list(tmp_path.glob("*.safetensors"))
    second: list[int] = []

    def compute(rows):
        second.append(int(rows[0]))
        return double(rows)

    found = score_table(tmp_path, "loss", points, compute, {}, chunk=2)
    assert second == [6, 8]  # of five chunks three were done
    assert found.tolist() == [2.0 * row for row in range(10)]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (data(order=[3, 1, 2, 0, *range(4, 10)]), r"the points in another order: got 10 .*\[100,"),
        (data(9), r"of another data set: got 10 points .*, expected 9 that"),
        (data(shift=0.1), "of another data set, with the same ids and other inputs or targets"),
    ],
)
def test_scores_of_another_set_or_order_are_refused(other, message, tmp_path):
    score_table(tmp_path, "loss", Points.of(data()), double, {})
    with pytest.raises(InputError, match=message):
        load_scores(table(tmp_path), "loss", Points.of(other))


def test_texts_are_told_apart_by_content_and_order(tmp_path):
    points = Points.of_texts(["a", "b", "c"])
    score_table(tmp_path, "yes", points, double, {})
    assert load_scores(table(tmp_path), "yes", Points.of_texts(["a", "b", "c"])).tolist() == [
        0,
        2,
        4,
    ]
    with pytest.raises(InputError, match="another order"):
        load_scores(table(tmp_path), "yes", Points.of_texts(["b", "a", "c"]))
    with pytest.raises(InputError, match="another data set"):
        load_scores(table(tmp_path), "yes", Points.of_texts(["a", "b", "d"]))


@pytest.mark.parametrize("damage", [b"", b"\xff" * 200])
def test_a_damaged_table_or_chunk_is_named_with_the_remedy(damage, tmp_path):
    points = Points.of(data())
    score_table(tmp_path, "loss", points, double, {})
    path = table(tmp_path)
    path.write_bytes(damage)
    with pytest.raises(InputError, match=r"score table .* cannot be read .*; remove it to have"):
        score_table(tmp_path, "loss", points, double, {})
    path.unlink()
    parts = path.with_suffix(".parts")
    parts.mkdir()
    (parts / "000000000-000000009.safetensors").write_bytes(damage)
    with pytest.raises(InputError, match=r"000000000-000000009.* cannot be read"):
        score_table(tmp_path, "loss", points, double, {})


def test_a_missing_table_and_a_file_of_another_kind_are_refused(tmp_path):
    from bads_ppl.checkpoint import save_checkpoint

    with pytest.raises(InputError, match="there is no score table"):
        load_scores(tmp_path / "none", "loss", Points.of(data()))
    save_checkpoint(tmp_path / "c.safetensors", {"ids": torch.zeros(1)}, {})
    with pytest.raises(InputError, match="not a bads-ppl score table"):
        load_scores(tmp_path / "c.safetensors", "loss", Points.of(data()))


def test_a_table_of_something_else_is_refused(tmp_path):
    points = Points.of(data())
    score_table(tmp_path, "loss", points, double, {})
    with pytest.raises(InputError, match="holds scores of loss, expected those of gain"):
        load_scores(table(tmp_path), "gain", points)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda rows: torch.where(rows == 3, torch.nan, 1.0), r"must be finite, .* for point 103"),
        (lambda rows: torch.zeros(1), "one score per point, got 1 for 10"),
    ],
)
def test_scores_that_are_not_finite_or_too_few_are_refused(values, message, tmp_path):
    with pytest.raises(InputError, match=message):
        score_table(tmp_path, "loss", Points.of(data()), values, {})


def test_a_cache_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot make cache .*: choose another folder"):
        score_table(tmp_path / "file" / "cache", "loss", Points.of(data()), double, {})


def test_a_second_run_waits_for_what_another_one_makes(tmp_path):
    path = tmp_path / "thing"
    context = multiprocessing.get_context("fork")
    ready, order = context.Event(), context.Queue()

    def second():
        ready.set()
        with locked(path):
            order.put("second")

    with locked(path):
        process = context.Process(target=second)
        process.start()
        assert ready.wait(30)
        process.join(0.3)
        assert process.is_alive()
        order.put("first")
    process.join(30)
    assert [order.get(timeout=5), order.get(timeout=5)] == ["first", "second"]


def test_progress_is_shown_only_when_asked_for_or_on_a_terminal(tmp_path, capfd):
    points = Points.of(data())
    score_table(tmp_path, "loss", points, double, {})
    assert capfd.readouterr().err == ""
    score_table(tmp_path, "gain", points, double, {}, progress=True)
    assert "scores (gain)" in capfd.readouterr().err
