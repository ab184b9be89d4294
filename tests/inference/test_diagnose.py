"""`python -m inference.diagnose` on finished, damaged and absent runs."""

import json
import shutil

import pytest

from inference.diagnose import main

TWO_CHAINS = ("chains=2", "model.auxiliary=persistent")


@pytest.mark.parametrize("options", [TWO_CHAINS, ("method=mixing",)])
def test_the_command_says_what_the_run_recorded(options, finished, results, capsys):
    folder = finished(*options)
    block = results(folder)["diagnostics"]
    for path in (folder, folder / "posterior.nc"):
        assert main([str(path)]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{block['verdict']}: {block['sentence']}\n")
        potential = next(line for line in out.splitlines() if line.startswith("potential"))
        numbers = [word.replace(",", "") for word in potential.split()[1:]]
        assert float(numbers[0]) == pytest.approx(block["functions"]["potential"]["mean"], rel=1e-3)
        assert numbers[2] == "unknown"  # R-hat of two draws


def test_wrong_input_ends_with_two_and_says_why(finished, tmp_path, capsys):
    def refused(path):
        assert main([str(path)]) == 2
        return capsys.readouterr().err

    assert "holds no finished run" in refused(tmp_path)
    assert "holds no finished run" in refused(tmp_path / "absent")
    copy = tmp_path / "copy"
    shutil.copytree(finished(*TWO_CHAINS), copy)
    weights = copy / "chain-1" / "w.f32"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert "got [2, 1], fewest in chain 1" in refused(copy)
    shutil.rmtree(copy / "chain-1")
    assert "lacks chain-1 of its 2 chains" in refused(copy)
    (copy / "posterior.nc").write_bytes(b"no netCDF")
    assert "cannot be read" in refused(copy / "posterior.nc")
    results = json.loads((copy / "results.json").read_text())
    del results["evidence"]
    (copy / "results.json").write_text(json.dumps(results))
    assert "'evidence'" in refused(copy)
