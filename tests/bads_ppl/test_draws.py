import json

import numpy as np
import pytest

from bads_ppl.draws import FUNCTIONS, HEADER, WEIGHTS, DrawWriter, read_draws
from bads_ppl.errors import InputError


def draw(k: int, size: int = 5) -> tuple[np.ndarray, dict[str, float]]:
    w = np.linspace(0, 1, size, dtype=np.float32) + np.float32(k)
    return w, {"step": float(k), "loss": k / 3}


def write(folder, numbers, keep=0):
    with DrawWriter(folder, 5, keep=keep) as writer:
        for k in numbers:
            writer.append(*draw(k))
        return writer.count


def test_what_was_written_is_read_in_full_precision(tmp_path):
    assert write(tmp_path / "chain", range(4)) == 4
    draws = read_draws(tmp_path / "chain")
    assert len(draws) == 4 and draws.w.dtype == np.float32
    assert np.array_equal(draws.w, np.stack([draw(k)[0] for k in range(4)]))
    assert draws.values["step"].tolist() == [0, 1, 2, 3]
    assert draws.values["loss"].tolist() == [k / 3 for k in range(4)]


def test_weights_stay_on_disk(tmp_path):
    write(tmp_path, range(4))
    assert isinstance(read_draws(tmp_path).w, np.memmap)
    assert (tmp_path / WEIGHTS).stat().st_size == 4 * 5 * 4
    assert (tmp_path / FUNCTIONS).stat().st_size == 4 * 2 * 8


def test_functions_may_come_in_any_order(tmp_path):
    with DrawWriter(tmp_path, 5) as writer:
        writer.append(draw(0)[0], {"a": 1.0, "b": 2.0})
        writer.append(draw(1)[0], {"b": 4.0, "a": 3.0})
    assert read_draws(tmp_path).values["a"].tolist() == [1, 3]
    assert json.loads((tmp_path / HEADER).read_text()) == {"size": 5, "names": ["a", "b"]}


def test_going_on_cuts_what_the_checkpoint_does_not_know(tmp_path):
    write(tmp_path, [0, 1, 2, 3])
    assert write(tmp_path, [7, 8], keep=2) == 4
    draws = read_draws(tmp_path)
    assert draws.values["step"].tolist() == [0, 1, 7, 8]
    assert np.array_equal(draws.w[2], draw(7)[0])


def test_starting_anew_forgets_the_draws_that_were_there(tmp_path):
    write(tmp_path, [0, 1, 2, 3])
    write(tmp_path, [9])
    assert read_draws(tmp_path).values["step"].tolist() == [9]


def test_a_half_written_draw_is_not_read(tmp_path):
    write(tmp_path, range(3))
    with (tmp_path / WEIGHTS).open("ab") as file:
        file.write(b"1234567")
    assert len(read_draws(tmp_path)) == 3
    assert len(read_draws(tmp_path, 2)) == 2


def test_rows_are_with_the_system_after_a_flush(tmp_path):
    with DrawWriter(tmp_path, 5) as writer:
        writer.append(*draw(0))
        writer.flush()
        assert len(read_draws(tmp_path)) == 1


def test_fewer_draws_than_the_checkpoint_says_are_refused(tmp_path):
    write(tmp_path, range(3))
    with pytest.raises(InputError, match=r"fewer draws than its checkpoint says \(4\)"):
        write(tmp_path, [], keep=4)
    assert len(read_draws(tmp_path)) == 3  # nothing was lost


@pytest.mark.parametrize("count", [0, 4])
def test_draws_that_are_not_there_are_refused(tmp_path, count):
    write(tmp_path, range(3))
    with pytest.raises(InputError, match="holds 3 draws, expected"):
        read_draws(tmp_path, count)


def test_a_damaged_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"draws\.json cannot be read"):
        read_draws(tmp_path)
    write(tmp_path, range(3))
    path = tmp_path / FUNCTIONS
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="is shorter than 3 draws"):
        read_draws(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(InputError, match="has no weights"):
        read_draws(tmp_path)
    (tmp_path / HEADER).write_text("{")
    with pytest.raises(InputError, match=r"draws\.json cannot be read"):
        read_draws(tmp_path)
