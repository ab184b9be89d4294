"""What is done is kept, what was interrupted goes on, and other settings are never mistaken."""

import json

import pytest

from inference.reproduce.cases import METHODS, Case, beta, sigma
from inference.reproduce.jobs import CostJob, Place, RunJob
from inference.reproduce.settings import OPEN_LLAMA, cifar10, llm, mnist
from inference.run import compose_run

BADS = Case(mnist(25), METHODS["bads"])


def test_a_finished_run_with_the_settings_of_now_is_done(write_run, place):
    # The run filled in what is null in the settings: that is no difference.
    assert write_run(BADS, 0, place).state() == ("done", "")


def test_a_run_without_results_is_interrupted_and_one_without_a_folder_is_missing(write_run, place):
    assert write_run(BADS, 0, place, finished=False).state().name == "interrupted"
    assert RunJob(BADS, 1, place).state().name == "missing"


@pytest.mark.parametrize(
    ("option", "finished", "difference"),
    [
        ("model.window=7", True, "model.window was 7, now 20"),
        ("steps=100", False, "steps was 100, now 1500"),
        ("task.meta_per_class=5", True, "task.data.meta_per_class was 5, now 25"),
    ],
)
def test_a_run_with_other_settings_is_told_by_what_differs(
    option, finished, difference, write_run, place
):
    job = write_run(BADS, 0, place, finished=finished, changed=[option])
    state = job.state()
    assert state.name == "other settings" and difference in state.detail


def test_a_damaged_configuration_is_no_finished_run(write_run, place):
    job = write_run(BADS, 0, place)
    (job.folder / "config.yaml").write_text("{")
    assert job.state().name == "other settings" and "cannot be read" in job.state().detail


def test_runs_differ_in_folder_by_all_that_makes_them_differ(tmp_path):
    places = [Place(tmp_path, "small"), Place(tmp_path, "paper"), Place(tmp_path, "small", "files")]
    places.append(Place(tmp_path, "small", "stand-in"))
    settings = mnist(25), mnist(5), cifar10(0.5), cifar10(0.5, longer=True)
    folders = {
        RunJob(case, seed, place).folder
        for place in places
        for seed in (0, 1)
        for setting in settings
        for method in METHODS.values()
        for case in (
            Case(setting, method),
            Case(setting, method, beta(0.5)),
            Case(setting, method, sigma(0.5)),
        )
    }
    # Files and torchvision's download are the same data; stand-ins are not.
    assert len(folders) == 3 * 2 * len(settings) * len(METHODS) * 3


def test_the_command_resumes_or_replaces(place):
    job = RunJob(BADS, 3, place)
    command = job.command(overwrite=False)
    assert command[1:3] == ["-m", "inference.run"] and "seed=3" in command
    assert "resume=true" in command and "overwrite=true" not in command
    assert "overwrite=true" in job.command(overwrite=True)
    assert "data.source=digits" in RunJob(BADS, 0, Place(place.root, "small", "stand-in")).options()


def test_another_language_model_takes_the_place_of_the_papers(tmp_path):
    place = Place(tmp_path, "paper", language_model="/my models/llama's")
    job = RunJob(Case(llm("mmlu"), METHODS["bads"]), 0, place)
    assert compose_run(job.options(), "it")[0].task.data.model == "/my models/llama's"
    assert not any("my models" in option for option in RunJob(BADS, 0, place).options())
    plain = RunJob(Case(llm("mmlu"), METHODS["bads"]), 0, Place(tmp_path, "paper"))
    assert compose_run(plain.options(), "it")[0].task.data.model == OPEN_LLAMA


def test_a_measurement_of_other_methods_is_not_done(place):
    job = CostJob(mnist(25), [BADS], place)
    assert job.state().name == "missing"
    job.folder.mkdir(parents=True)
    content = {"methods": job.specification(), "failed": {}}
    job.path.write_text(json.dumps(content))
    assert job.state().name == "done"
    more = CostJob(mnist(25), [BADS, Case(mnist(25), METHODS["blo"])], place)
    assert more.state().name == "other settings"
    job.path.write_text(json.dumps({**content, "failed": {"bads": "it diverged"}}))
    assert job.state().name == "interrupted"


def test_sigma_is_in_points_of_the_total_and_goes_with_the_root_of_the_train_set():
    setting = mnist(25)
    assert sigma(0.5).options(setting, "small") == ("prior.sparsity_scale=35.4",)
