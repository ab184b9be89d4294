"""Point-removal curves of finished runs: what is removed, what is kept for later, wrong input."""

import shutil

import numpy as np
import pandas as pd
import pytest
import yaml

from bads_ppl.kernel import MinibatchKernel
from bads_ppl.selection import Selection
from inference.removal import curve, main, read_removal

NOISE = ("task=mnist10_noise", "task.data.per_class=20", "task.meta_per_class=5")


@pytest.fixture
def folder(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished(*NOISE), copy)
    return copy


def test_points_go_in_the_order_of_their_weights_and_wrong_labels_first_where_known(folder):
    removal = read_removal(folder)
    mean, right = Selection.from_parquet(folder / "weights.parquet").mean, removal.task.right
    assert (np.diff(mean[removal.orders["lowest weights"]]) >= 0).all()
    wrong = int((~right).sum())
    assert not right[removal.orders["wrong labels, then random"][:wrong]].any()
    for order in removal.orders.values():
        assert sorted(order) == list(range(len(mean)))


def test_the_curve_counts_what_is_left_and_trains_on_nothing_else(folder, monkeypatch):
    seen = []
    step = MinibatchKernel.step
    monkeypatch.setattr(
        MinibatchKernel, "step", lambda kernel: (seen.append(len(kernel.train)), step(kernel))
    )
    removal = read_removal(folder, steps=2, networks=2)
    removal.config.workers = 1  # where the count above sees them
    size, wrong = len(removal.task.train), int((~removal.task.right).sum())
    table = curve(removal, [0.0, wrong / size])
    assert len(table) == 3 * 2 * 2  # orders, shares, networks
    assert set(seen) == {size, size - wrong}
    by_order = table[table.share > 0].groupby("order")
    assert set(by_order.points.first()) == {size - wrong}
    assert by_order.wrong.first()["wrong labels, then random"] == 0
    assert by_order.wrong.first()["random"] > 0
    whole = table[table.share == 0]
    assert (whole.wrong == wrong).all()
    assert whole.groupby("network").accuracy.nunique().eq(1).all()  # nothing is removed: the same


def test_a_run_from_before_an_option_is_read_with_its_default(folder):
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    del config["data"]["train"]
    path.write_text(yaml.safe_dump(config))
    assert read_removal(folder).config.data.train is None


def test_a_run_whose_settings_are_of_another_kind_is_refused(folder, capsys):
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(config | {"chains": "many"}))
    with pytest.raises(SystemExit) as stopped:
        main([str(folder)])
    assert stopped.value.code == 2 and "config.yaml does not fit" in capsys.readouterr().err


def test_a_second_call_trains_nothing_anew_and_writes_the_same_curve(folder, monkeypatch, capsys):
    arguments = [str(folder), "--shares", "0", "0.5", "--networks", "1", "--steps", "2"]
    assert main(arguments) == 0
    first = pd.read_csv(folder / "removal.csv")
    assert (folder / "removal.png").stat().st_size > 10_000
    monkeypatch.setattr(MinibatchKernel, "step", lambda kernel: pytest.fail("it trains again"))
    assert main(arguments) == 0
    assert pd.read_csv(folder / "removal.csv").equals(first)


def test_other_steps_or_weights_are_trained_beside_what_is_there(folder):
    for steps in (2, 3, 2):
        assert main([str(folder), "--shares", "0.5", "--networks", "1", "--steps", str(steps)]) == 0
    assert len(list((folder / "removal").iterdir())) == 2 * 3  # lengths, orders
    removal = read_removal(folder, steps=2, networks=1)
    removal.orders["lowest weights"] = removal.orders["lowest weights"][::-1]
    curve(removal, [0.5])
    assert len(list((folder / "removal").iterdir())) == 2 * 3 + 1


def test_a_task_of_texts_is_refused_with_what_to_do_instead(
    folder, writing_task, monkeypatch, capsys
):
    monkeypatch.setattr("inference.removal.load_task", lambda config: writing_task())
    with pytest.raises(SystemExit) as stopped:
        main([str(folder)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "task numbers writes texts: compare runs with" in said
    assert not (folder / "removal.csv").exists()


def test_wrong_input_ends_with_two_and_says_why(folder, finished, tmp_path, capsys):
    def refused(path, *options):
        with pytest.raises(SystemExit) as end:
            main([str(path), *options])
        assert end.value.code == 2
        return capsys.readouterr().err

    assert "holds no finished run" in refused(tmp_path)
    assert "shares must be in [0, 1)" in refused(folder, "--shares", "1")
    assert "shares must be in [0, 1)" in refused(folder, "--shares", "-0.1")
    assert "got 0.999 of 200 points" in refused(folder, "--shares", "0.999")
    assert "all weights in" in refused(finished("method=mixing"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["seed"] = 1
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert "are those of 200 other points" in refused(folder)
