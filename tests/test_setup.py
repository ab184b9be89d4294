from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11", "3.12", "3.13")

# ---------------------------------------------------------------------------------- constraints


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def test_constraints_are_exact_and_free_of_what_pip_refuses_in_them() -> None:
    for pin in pins():
        assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), pin
        assert not pin.extras and pin.url is None, pin
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text and "--index" not in text


@pytest.mark.parametrize("python", PYTHONS)
def test_every_direct_dependency_has_one_pin_that_it_admits(python: str) -> None:
    marks = default_environment() | {"python_version": python, "python_full_version": f"{python}.9"}
    active = {}
    for pin in pins():
        if pin.marker is None or pin.marker.evaluate(marks):
            name = canonicalize_name(pin.name)
            assert name not in active, f"two pins of {name} for Python {python}"
            active[name] = next(iter(pin.specifier)).version
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in map(Requirement, (text for group in groups for text in group)):
        name = canonicalize_name(requirement.name)
        assert name in active, f"constraints.txt has no pin for {name}; see its first lines"
        assert requirement.specifier.contains(active[name]), f"{requirement} against {active[name]}"


# ------------------------------------------------------------------------------ packages, imports


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The top-level packages that a module imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("bads_ppl", {"models", "inference", "tests", "benchmarks"}),
        ("models", {"inference", "tests", "benchmarks"}),
        ("inference", {"tests", "benchmarks"}),
    ],
)
def test_imports_point_one_way(package: str, forbidden: set[str]) -> None:
    assert modules(package)
    for path in modules(package):
        assert not imported(path) & forbidden, path.relative_to(ROOT)


@pytest.mark.parametrize("package", ["bads_ppl", "models", "inference"])
def test_every_import_is_declared(package: str) -> None:
    distributions = {"pyro": "pyro-ppl", "hydra": "hydra-core", "sklearn": "scikit-learn",
                     "PIL": "pillow", "yaml": "pyyaml"}  # fmt: skip
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    own = {"bads_ppl", "models", "inference", *sys.stdlib_module_names}
    optional = {
        canonicalize_name(Requirement(text).name)
        for group, texts in PROJECT["optional-dependencies"].items()
        if group != "dev"
        for text in texts
    }
    for path in modules(package):
        for name in imported(path) - own:
            distribution = canonicalize_name(distributions.get(name, name))
            assert distribution in declared | optional, f"{path.relative_to(ROOT)} imports {name}"


def test_the_library_says_that_it_is_typed() -> None:
    assert (ROOT / "bads_ppl" / "py.typed").is_file()


# ------------------------------------------------------------------------------- make, .ci/run


def tool_folder(tmp_path: Path, **scripts: str) -> Path:
    """A folder for PATH with make, a shell and the given fake commands, and nothing else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("make", "sh", "sed"):
        found = shutil.which(tool)
        if found is None:
            pytest.skip(f"needs {tool}")
        (folder / tool).symlink_to(found)
    for name, script in scripts.items():
        path = folder / name.replace("_", ".")
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return folder


# A stand-in for an interpreter: it answers the three questions that the Makefile asks.
FAKE = """case "$2" in
  *print*) echo {version} ;;
  *exit*) exit {too_old} ;;
  *ensurepip*) exit {no_venv} ;;
esac"""
OLD = FAKE.format(version="3.9", too_old=1, no_venv=0)
BARE = FAKE.format(version="3.12", too_old=0, no_venv=1)
GOOD = FAKE.format(version="3.13", too_old=0, no_venv=0)
SHIM = "echo 'command not found' >&2; exit 127"


def make(
    *arguments: str, path: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    for name in ("PYTHON", "VENV", "ARGS"):
        inherited.pop(name, None)
    if path is not None:
        inherited["PATH"] = str(path)
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env=inherited | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_make_alone_lists_the_targets() -> None:
    listed = make()
    assert listed.returncode == 0
    for target in ("setup", "run", "test", "test-all", "lint", "format", "clean"):
        assert re.search(rf"^make {target} +\w", listed.stdout, re.MULTILINE), target


def test_make_takes_the_first_python_that_will_do(tmp_path: Path) -> None:
    folder = tool_folder(tmp_path, python3=OLD, python3_13=SHIM, python3_12=BARE, python3_11=GOOD)
    chosen = make("check-python", path=folder)
    assert (chosen.returncode, chosen.stdout.strip()) == (0, "python3.11"), chosen.stderr


def test_make_takes_the_python_that_is_named() -> None:
    chosen = make("check-python", f"PYTHON={sys.executable}")
    assert (chosen.returncode, chosen.stdout.strip()) == (0, sys.executable), chosen.stderr


@pytest.mark.parametrize(
    ("scripts", "expected"),
    [
        ({"python3": OLD}, r"3\.11 or later is needed.*python3 is Python 3\.9.*PYTHON="),
        ({}, r"3\.11 or later is needed.*none of them runs.*PYTHON="),
        ({"python3": SHIM}, r"3\.11 or later is needed.*none of them runs.*PYTHON="),
        ({"python3": BARE}, r"3\.12 is there, but its venv.*install python3\.12-venv.*PYTHON="),
    ],
)
def test_make_says_what_to_install_where_no_python_will_do(
    tmp_path: Path, scripts: dict[str, str], expected: str
) -> None:
    venv = tmp_path / "venv"
    refused = make("setup", f"VENV={venv}", path=tool_folder(tmp_path, **scripts))
    assert refused.returncode != 0
    assert re.search(expected, refused.stderr, re.DOTALL), refused.stderr
    assert not venv.exists()


@pytest.mark.parametrize(
    ("target", "extra", "marks"),
    [("setup", ".", {".ready"}), ("lint", ".[dev,text,llm,sweep]", {".ready", ".ready-dev"})],
)
def test_set_up_is_done_once_and_again_after_an_interruption(
    tmp_path: Path, target: str, extra: str, marks: set[str]
) -> None:
    # An interpreter that makes environments of itself and writes down what it is asked to do.
    log, venv = tmp_path / "log", tmp_path / "venv"
    folder = tool_folder(
        tmp_path,
        python3=f"""echo "$*" >> '{log}'
case "$*" in
  *print*) echo 3.12 ;;
  "-m venv"*) mkdir -p '{venv}/bin' && rm -f '{venv}'/.ready* && cp "$0" '{venv}/bin/python' ;;
  "-m pip"*) [ -z "$FAIL" ] ;;
esac""",
    )
    for tool in ("mkdir", "cp", "rm", "touch"):
        (folder / tool).symlink_to(shutil.which(tool) or pytest.skip(f"needs {tool}"))

    def asked(**variables: str) -> tuple[int, list[str]]:
        log.write_text("")
        code = make(target, f"VENV={venv}", path=folder, **variables).returncode
        lines = log.read_text().splitlines()
        return code, [line for line in lines if line.startswith(("-m venv", "-m pip"))]

    def there() -> set[str]:
        return {path.name for path in venv.glob(".ready*")}

    code, done = asked(FAIL="1")
    assert code != 0 and len(done) == 2 and not there()
    code, done = asked()
    assert code == 0 and there() == marks
    assert "--clear" in done[0]
    assert "--constraint constraints.txt" in done[1] and done[1].endswith(f"--editable {extra}")
    assert asked() == (0, [])

    for mark in marks:  # older than pyproject.toml
        os.utime(venv / mark, (0, 0))
    code, done = asked(FAIL="1")
    assert code != 0 and len(done) == 1 and not there()
    code, done = asked()
    assert code == 0 and len(done) == 2 and there() == marks


def test_ci_runs_make_test_and_can_be_executed() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()
