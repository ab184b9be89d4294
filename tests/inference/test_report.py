"""The report's numbers, what it names as missing or damaged, and that it needs nothing else."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from bads_ppl import plots
from bads_ppl.errors import InputError
from inference import report
from inference.extremes import write_samples
from inference.report import main, make_sections, render, write_report
from inference.report_figures import score_by_arm
from inference.runs import find_runs


def write_run(root, method="bads", seed=0, accuracy=0.9, *, task="mnist", settings=(), **results):
    """A small run's folder, as `inference.run` writes it; `settings` go into the model's config."""
    name = "-".join([method, *[str(value) for value in dict(settings).values()]])
    folder = root / task / str(results.get("dataset", "mnist")) / name / f"seed{seed}"
    (folder / "plots").mkdir(parents=True)
    config = {
        "seed": seed,
        "steps": 200,
        "run_dir": None,
        "device": "cpu",
        "task": {"meta_per_class": 25, "data": {"seed": seed}},
        "model": {"auxiliary": "restarted", **dict(settings)},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = [
        {"chain": chain, "step": step, "test.accuracy": accuracy - 0.1 / step}
        for chain in range(2)
        for step in (100, 200)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    content = {
        "task": task,
        "dataset": "mnist",
        "method": method,
        "seed": seed,
        "steps": 200,
        "model": "joint" if method == "bads" else "none",
        "chains": 2,
        "sparsity": 0.005,
        "weights": "instance" if method == "bads" else "fixed",
        "sampler": "sgld",
        "settings": config["task"],
        "test": {"accuracy": accuracy, "accuracy_last": accuracy},
        "groups": {"rare": {"mean_weight": 0.8, "count": 25, "high": True}},
        "cost": {"seconds": 12.5, "ms_per_step": 3.25, "peak_memory_mib": 801.0},
        "versions": {"torch": "9.8.7"},
        "warnings": [],
        **results,
    }
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def text_of(page):
    """The page's text without markup, white space made single."""
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


class TestGrouping:
    def test_methods_are_ranked_by_their_mean_over_seeds(self, tmp_path):
        for seed in range(3):
            write_run(tmp_path, "mixing", seed, 0.7 + 0.01 * seed)
            write_run(tmp_path, "bads", seed, 0.9 + 0.02 * seed)
        (section,) = make_sections(find_runs(tmp_path))
        assert [arm.text("method") for arm in section.arms] == ["bads", "mixing"]
        assert [arm.best for arm in section.arms] == [True, False]
        assert section.arms[0].score.mean == pytest.approx(0.92)
        assert section.arms[1].score.median == pytest.approx(0.71)

    def test_difference_to_the_best_is_paired_by_seed(self, tmp_path):
        for seed, accuracy in enumerate([0.80, 0.90, 0.85]):
            write_run(tmp_path, "bads", seed, accuracy)
            write_run(tmp_path, "mixing", seed, accuracy - 0.05)
        write_run(tmp_path, "mixing", 7, 0.1)  # a seed that the best does not have
        (section,) = make_sections(find_runs(tmp_path))
        difference = section.arms[1].difference
        assert difference.count == 3
        assert difference.low == pytest.approx(-0.05) and difference.high == pytest.approx(-0.05)

    def test_other_data_and_other_task_settings_are_other_tasks(self, tmp_path):
        write_run(tmp_path)
        write_run(tmp_path, dataset="digits")
        write_run(tmp_path, task="other")
        few = write_run(tmp_path, seed=1)
        content = json.loads((few / "results.json").read_text())
        content["settings"]["meta_per_class"] = 5
        (few / "results.json").write_text(json.dumps(content))
        sections = make_sections(find_runs(tmp_path))
        assert len(sections) == 4
        titles = {section.short_title for section in sections}
        assert "mnist · meta_per_class 5 · mnist" in titles and len(titles) == 4

    def test_runs_with_other_settings_are_not_pooled_and_the_difference_is_named(self, tmp_path):
        for seed in range(2):
            write_run(tmp_path, seed=seed)
            write_run(tmp_path, seed=seed, settings={"auxiliary": "persistent"})
        (section,) = make_sections(find_runs(tmp_path))
        assert sorted(arm.variant["auxiliary"] for arm in section.arms) == [
            "persistent",
            "restarted",
        ]
        assert section.differing == ["model.auxiliary"]
        assert [arm.score.count for arm in section.arms] == [2, 2]

    def test_where_runs_ran_makes_no_difference(self, tmp_path):
        for seed, where in enumerate(({}, {"table": "disk"}, {"parallel": "fsdp", "workers": 1})):
            folder = write_run(tmp_path, seed=seed)
            config = yaml.safe_load((folder / "config.yaml").read_text())
            (folder / "config.yaml").write_text(yaml.safe_dump(config | where))
        (section,) = make_sections(find_runs(tmp_path))
        (arm,) = section.arms
        assert arm.score.count == 3 and not section.differing

    def test_repeated_seed_counts_once_and_is_named(self, tmp_path):
        write_run(tmp_path / "a", accuracy=0.8)
        write_run(tmp_path / "b", accuracy=0.6)
        runs = find_runs(tmp_path)
        (section,) = make_sections(runs)
        assert section.arms[0].score.count == 1 and section.arms[0].score.mean == 0.8
        assert "repeats seed 0 of a/" in runs[1].problems[0]


class TestPage:
    def test_numbers_of_the_table_are_on_the_page(self, tmp_path):
        for seed, accuracy in enumerate([0.90, 0.92, 0.94]):
            write_run(tmp_path, seed=seed, accuracy=accuracy)
        text = text_of(render(find_runs(tmp_path)))
        for expected in ("92.0 [87.0, 97.0]", "0.800", "3.25", "12.5", "801", "torch 9.8.7"):
            assert expected in text

    def test_verdicts_of_the_runs_are_in_the_table_and_their_sentences_below(self, tmp_path):
        for seed, verdict in enumerate(["not converged", "approximate", "approximate"]):
            said = {"verdict": verdict, "sentence": f"Sentence {seed}."}
            write_run(tmp_path, seed=seed, diagnostics=said)
        write_run(tmp_path, "mixing")  # a run from before there were verdicts
        text = text_of(render(find_runs(tmp_path)))
        assert "approximate (2) , not converged (1)" in text
        for seed in range(3):
            assert f"Sentence {seed}." in text

    def test_one_seed_is_said_to_have_no_interval(self, tmp_path):
        write_run(tmp_path)
        text = text_of(render(find_runs(tmp_path)))
        assert "one seed: no interval" in text
        assert "no differences between methods can be claimed" in text

    def test_no_tick_says_more_than_100_percent(self, tmp_path):
        write_run(tmp_path, accuracy=0.983)
        (section,) = make_sections(find_runs(tmp_path))
        figure = score_by_arm(section.arms, "accuracy")
        figure.draw_without_rendering()
        (axes,) = figure.axes
        assert axes.get_xlim()[1] > 1.01
        shown = [label.get_text() for label in axes.get_xticklabels()]
        assert "100 %" in shown and "102 %" not in shown

    def test_page_needs_no_other_file(self, tmp_path):
        folder = write_run(tmp_path)
        plots.save(
            plots.accuracy_over_steps([{"chain": 0, "step": 1, "test.accuracy": 0.5}]),
            folder / "plots" / "test_accuracy.png",
            dpi=30,
        )
        page = render(find_runs(tmp_path))
        sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
        assert sources and all(s.startswith(("data:image/", "#")) for s in sources)
        assert page.count("data:image/svg+xml;base64,") == 2
        assert page.count("data:image/png;base64,") == 1
        assert "<script" not in page and "@import" not in page and "url(" not in page
        assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page

    def test_warnings_of_runs_are_shown_once_with_their_count(self, tmp_path):
        warning = "dataset is 'digits', not MNIST"
        for seed in range(2):
            write_run(tmp_path, seed=seed, dataset="digits", warnings=[warning])
        text = text_of(render(find_runs(tmp_path)))
        assert text.count("&#39;digits&#39;, not MNIST (2 runs)") == 1
        assert "data: digits" in text

    def test_markup_in_names_is_escaped(self, tmp_path):
        write_run(tmp_path, dataset="<b>x</b>")
        page = render(find_runs(tmp_path))
        assert "<b>x</b>" not in page and "&lt;b&gt;x&lt;/b&gt;" in page

    def test_paper_mode_is_called_no_posterior(self, tmp_path):
        write_run(tmp_path, mode="paper")
        assert "no posterior" in text_of(render(find_runs(tmp_path)))

    def test_task_without_accuracy_is_shown_in_its_own_unit(self, tmp_path):
        write_run(tmp_path, test={"bleu": 31.25, "count": 100})
        text = text_of(render(find_runs(tmp_path)))
        assert "test bleu" in text and "31.2" in text


class TestTextsWritten:
    SAMPLES = (
        {"source": "A | b | C", "written": "A is C.", "reference": "The b of A is C."},
        {"source": "José | b | 1,5", "written": "", "reference": 'He said "no",\r\nor so'},
        {"source": "<i>D</i>", "written": "<script>alert(1)</script>", "reference": "nan"},
    )

    def test_what_a_run_wrote_is_read_as_it_was(self, tmp_path):
        write_samples(write_run(tmp_path), self.SAMPLES)
        (run,) = find_runs(tmp_path)
        assert run.samples == list(self.SAMPLES) and run.problems == []

    def test_what_a_run_wrote_is_on_the_page_and_never_as_markup(self, tmp_path):
        write_samples(write_run(tmp_path), self.SAMPLES)
        page = render(find_runs(tmp_path))
        assert "&lt;script&gt;alert(1)" in page and "<script" not in page and "<i>" not in page
        text = text_of(page)
        assert "Texts that it wrote source written a reference A | b | C A is C. The b of A" in text

    def test_a_run_that_wrote_nothing_has_no_place_for_it(self, tmp_path):
        write_run(tmp_path)
        (run,) = find_runs(tmp_path)
        assert run.samples == [] and run.problems == []
        assert "Texts that it wrote" not in render([run])

    @pytest.mark.parametrize(
        "content",
        [
            b"source,written\nA,B\n",
            b"source,written,reference\nA,B,C\nD,E",  # the end of it is lost
            b"source,written,reference\nA,B,C,D\n",
            b"source,written,reference\n\xff\xfe,B,C\n",
            b"source,written,reference\n" + b"A" * 200_000 + b",B,C\n",
        ],
    )
    def test_a_damaged_file_is_named_and_the_run_counts(self, tmp_path, content):
        folder = write_run(tmp_path)
        (folder / "written.csv").write_bytes(content)
        (run,) = find_runs(tmp_path)
        assert run.samples == [] and "written.csv is damaged" in run.problems[0]
        text = text_of(render([run]))
        assert "written.csv is damaged" in text and "1 finished run" in text

    def test_train_texts_whose_end_is_lost_are_named_and_the_run_counts(self, tmp_path):
        folder, head = write_run(tmp_path), "end,id,mean,sd,text\nlowest,7,0.1,0.2"
        for rest, named in ((",a", False), ("", True), (",a\nhighest,3,0.", True)):
            (folder / "texts.csv").write_text(head + rest)
            (run,) = find_runs(tmp_path)
            text = text_of(render([run]))
            assert ("texts.csv is damaged" in text) == named and "1 finished run" in text
            assert ("Texts with the lowest weights" in text) != named
            assert "Texts with the highest weights" not in text

    def test_train_texts_without_labels_have_no_column_for_them(self, tmp_path):
        folder = write_run(tmp_path)
        rows = "lowest,7,0.1,0.2,a bad text\nhighest,3,0.9,0.1,a good text\n"
        (folder / "texts.csv").write_text("end,id,mean,sd,text\n" + rows)
        text = text_of(render(find_runs(tmp_path)))
        assert "mean w sd id text 0.100 0.200 7 a bad text" in text
        (folder / "texts.csv").write_text("end,id,label,mean,sd,text\nlowest,7,old,0.1,0.2,a\n")
        assert "mean w sd label id text 0.100 0.200 old 7 a" in text_of(render(find_runs(tmp_path)))

    def test_a_task_s_own_words_say_what_weights_should_find(self, tmp_path):
        right = {"what": "text fits its data", "auc": 0.75, "average_precision": 0.5}
        write_run(tmp_path, right=right)
        assert "AUC of w: text fits its data" in text_of(render(find_runs(tmp_path)))
        del right["what"]  # a run from before tasks had them
        write_run(tmp_path / "old", right=right)
        assert "AUC of w: label is right" in text_of(render(find_runs(tmp_path / "old")))


class TestTrouble:
    def test_unfinished_run_is_listed_and_left_out(self, tmp_path):
        write_run(tmp_path)
        (write_run(tmp_path, seed=1) / "results.json").unlink()
        runs = find_runs(tmp_path)
        assert make_sections(runs)[0].arms[0].score.count == 1
        text = text_of(render(runs))
        assert "1 finished run, 1 task; 1 unfinished" in text
        assert "mnist/mnist/bads/seed1" in text

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ('{"task": "mnist", ', "results.json is damaged"),
            ("[1]", "expected an object, got list"),
            ('{"task": "mnist", "method": "bads", "test": {}}', "it has no &#39;seed&#39;"),
            ('{"task": "m", "method": "b", "seed": 0, "test": 3}', "has no number"),
            (
                '{"task": "m", "method": "b", "seed": 0, "test": {"accuracy": 1}, "groups": [1]}',
                "&#39;groups&#39; is not a dict",
            ),
        ],
    )
    def test_damaged_results_are_named_and_left_out(self, tmp_path, content, reason):
        write_run(tmp_path)
        (write_run(tmp_path, seed=1) / "results.json").write_text(content)
        text = text_of(render(find_runs(tmp_path)))
        assert reason in text and "1 finished run, 1 task." in text

    def test_damaged_lesser_files_are_named_and_the_run_counts(self, tmp_path):
        folder = write_run(tmp_path)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"chain": 0, "st')
        (folder / "config.yaml").write_text("a: [")
        (folder / "plots" / "x.png").write_bytes(b"no picture")
        text = text_of(render(find_runs(tmp_path)))
        assert "metrics.jsonl is damaged after 4 rows" in text
        assert "config.yaml is damaged" in text and "plots/x.png is damaged" in text
        assert "1 finished run" in text

    def test_run_without_curves_and_settings_is_still_shown(self, tmp_path):
        folder = write_run(tmp_path)
        (folder / "metrics.jsonl").unlink()
        (folder / "config.yaml").unlink()
        assert "90.0" in text_of(render(find_runs(tmp_path)))

    def test_folders_of_chains_and_hidden_folders_are_no_runs(self, tmp_path):
        folder = write_run(tmp_path)
        for name in ("chain-0", ".hydra"):
            (folder / name).mkdir()
            (folder / name / "config.yaml").write_text("")
        (tmp_path / ".hydra").mkdir()
        (tmp_path / ".hydra" / "config.yaml").write_text("")
        assert len(find_runs(tmp_path)) == 1
        assert len(find_runs(folder)) == 1

    def test_no_runs_is_an_error(self, tmp_path):
        with pytest.raises(InputError, match=r"no runs in .*results\.json"):
            find_runs(tmp_path)
        with pytest.raises(InputError, match="is not a folder"):
            find_runs(tmp_path / "absent")


class TestCommandLine:
    def test_page_lies_beside_the_runs_or_where_asked(self, tmp_path, capsys):
        write_run(tmp_path)
        assert main([str(tmp_path)]) == 0
        assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
        assert main([str(tmp_path), "--output", str(tmp_path / "b.html")]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "b.html")
        assert {"report.html", "b.html", "mnist"} == set(os.listdir(tmp_path))

    def test_wrong_input_ends_with_two_and_an_unwritable_page_with_one(self, tmp_path, capsys):
        assert main([str(tmp_path)]) == 2
        assert "error: no runs in" in capsys.readouterr().err
        write_run(tmp_path)
        assert main([str(tmp_path), "--output", str(tmp_path / "absent" / "b.html")]) == 1
        assert "create it" in capsys.readouterr().err

    def test_failed_page_keeps_the_old_one(self, tmp_path, monkeypatch):
        write_run(tmp_path)
        page = write_report(tmp_path)
        before = page.read_text()

        def fail(runs):
            raise OSError("no")

        monkeypatch.setattr(report, "render", fail)
        with pytest.raises(OSError, match="no"):
            write_report(tmp_path)
        assert page.read_text() == before

    def test_module_runs(self, tmp_path):
        command = [sys.executable, "-m", "inference.report", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "no runs in" in done.stderr
