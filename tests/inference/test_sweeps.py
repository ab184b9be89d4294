"""Many runs by one command, some at a time."""

import pandas as pd
import pytest

pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs bads-ppl[sweep]")


def test_runs_side_by_side_are_those_of_their_own(start, small, finished, tmp_path):
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    where = f"run_dir={tmp_path}/seed${{seed}}"
    sweep = start("-m", *launcher, *small, "task=mnist", "seed=0,1", where, "workers=1")
    _, told = sweep.communicate()
    assert sweep.returncode == 0, told
    for seed in (0, 1):
        own = finished("task=mnist", f"seed={seed}")
        pd.testing.assert_frame_equal(
            pd.read_parquet(tmp_path / f"seed{seed}" / "weights.parquet"),
            pd.read_parquet(own / "weights.parquet"),
        )


def test_a_sweep_with_wrong_input_says_so_and_fails(start, small, tmp_path):
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    where = f"run_dir={tmp_path}/seed${{seed}}"
    sweep = start("-m", *launcher, *small, "task=mnist", "seed=0,1", where, "steps=-1")
    _, told = sweep.communicate()
    assert sweep.returncode != 0 and "steps must be" in told
    assert not list(tmp_path.glob("seed*"))
