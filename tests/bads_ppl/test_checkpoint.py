import pytest
import torch
from safetensors.torch import save_file

from bads_ppl.checkpoint import load_checkpoint, save_checkpoint
from bads_ppl.errors import InputError

TENSORS = {
    "a": torch.randn(3, 2, generator=torch.Generator()),
    "total": torch.tensor(1 / 3, dtype=torch.float64),
    "state": torch.Generator().get_state(),
    "empty": torch.zeros(0, 4),
}
ABOUT = {"seed": 3, "settings": {"sparsity": 0.1}, "metrics": [{"step": 1, "loss": 1 / 3}]}


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path):
    path = tmp_path / "new" / "folder" / "c.safetensors"
    save_checkpoint(path, TENSORS, ABOUT)
    tensors, about = load_checkpoint(path)
    assert about == ABOUT and set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype


def test_tensors_with_gradients_and_odd_strides_are_saved(tmp_path):
    path = tmp_path / "c.safetensors"
    value = torch.arange(6.0).view(2, 3).t().requires_grad_()
    save_checkpoint(path, {"t": value}, {})
    assert torch.equal(load_checkpoint(path)[0]["t"], value.detach())


def test_a_failed_save_leaves_the_old_one(tmp_path):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, TENSORS, ABOUT)
    with pytest.raises(TypeError):
        save_checkpoint(path, TENSORS, {"seed": object()})
    assert load_checkpoint(path)[1] == ABOUT
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_file_is_refused_with_the_remedy(tmp_path, damage):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, TENSORS, ABOUT)
    path.write_bytes(path.read_bytes()[:-5] if damage is None else damage)
    with pytest.raises(InputError, match=r"cannot be read .*it is damaged; remove it"):
        load_checkpoint(path)


@pytest.mark.parametrize("header", [None, {"format": "pt"}, {"format": "bads-ppl checkpoint 0"}])
def test_a_file_of_another_kind_is_refused(tmp_path, header):
    path = tmp_path / "c.safetensors"
    save_file({"a": torch.zeros(2)}, path, header)
    with pytest.raises(InputError, match=r"is not a bads-ppl checkpoint: .*expected 'bads-ppl"):
        load_checkpoint(path)
