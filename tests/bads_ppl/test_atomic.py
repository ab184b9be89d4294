"""Files written through `atomic_path` are whole or absent."""

import errno
import os
import resource
import stat

import pytest

from bads_ppl.atomic import atomic_path


def test_file_appears_only_after_the_body_has_succeeded(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent and temporary.suffix == ".txt"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_failure_in_the_body_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_permissions_follow_the_umask_and_links_stay_links(tmp_path):
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    before = os.umask(0o022)
    try:
        with atomic_path(link) as temporary:
            temporary.write_text("new")
    finally:
        os.umask(before)
    assert link.is_symlink() and target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


def test_missing_folder_names_the_path_and_the_remedy(tmp_path):
    path = tmp_path / "absent" / "a.txt"
    with pytest.raises(FileNotFoundError, match=r"absent/a\.txt.*create it"), atomic_path(path):
        pytest.fail("the body must not run where the file cannot be written")


def test_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "a"
    with pytest.raises(NotADirectoryError, match="not a folder"), atomic_path(path):
        pass


def test_path_that_is_a_folder_is_refused_and_stays(tmp_path):
    (tmp_path / "a").mkdir()
    with (
        pytest.raises(IsADirectoryError, match="choose another name"),
        atomic_path(tmp_path / "a") as temporary,
    ):
        temporary.write_text("")
    assert os.listdir(tmp_path) == ["a"]


def test_write_that_the_system_refuses_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"a\.bin") as caught, atomic_path(path) as temporary:
            temporary.write_bytes(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"),
    ],
)
def test_full_disk_is_named_whichever_library_reports_it(tmp_path, error):
    with pytest.raises(OSError, match=r"a\.bin.*free some space"), atomic_path(tmp_path / "a.bin"):
        raise error
    assert os.listdir(tmp_path) == []


def test_error_of_the_body_about_another_file_is_passed_on_unchanged(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"source\.txt") as caught,
        atomic_path(tmp_path / "a.txt"),
    ):
        (tmp_path / "source.txt").read_text()
    assert "cannot write" not in str(caught.value)
