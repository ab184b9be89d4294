"""Every notebook runs from start to end, and is stored with its outputs."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def text(notebook) -> str:
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return "\n".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)


def numbers(pattern: str, found: str) -> list[float]:
    return [float(number) for number in re.search(pattern, found).groups()]


def check_first_steps(found: str) -> None:
    threes, eights = numbers(r"threes (\S+), of eights (\S+)", found)
    assert threes > 3 * eights


def check_posterior_diagnostics(found: str) -> None:
    """What the text around the plots says of them."""
    assert "approximate: The chains agree" in found
    (rhat,) = numbers(r"99 % of the weights have R-hat <= (\S+),", found)
    assert rhat <= 1.05
    rare, frequent, wrong = (
        numbers(rf"{name}: mean (\S+),", found)[0] for name in ("rare", "frequent", "wrong")
    )
    assert rare > 2 * frequent > 4 * wrong
    (apart,) = numbers(r"from the library's own: (\S+)", found)
    assert apart < 1e-3
    shift, ratio = numbers(r"means apart by (\S+) sd .*, sd ratio (\S+)", found)
    assert shift < 0.2 and ratio == pytest.approx(1, abs=0.1)


CHECKS = {
    "first_steps": check_first_steps,
    "posterior_diagnostics": check_posterior_diagnostics,
}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a notebook has chains of its own, beside other tests
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    CHECKS[path.stem](text(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_outputs_and_without_warnings(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.get("name") == "stderr"]
