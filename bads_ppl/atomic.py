"""Files that are either the old one or the new one, never half of the new one.

Everything that this package writes whole goes through `atomic_path`: the body writes a temporary
file in the same folder, which then takes the place of the old file in one step.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
    errno.EFBIG: "the file is larger than this system allows: choose another folder",
    errno.EACCES: "the folder is not writable: change its permissions or choose another one",
    errno.EPERM: "the folder is not writable: change its permissions or choose another one",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOENT: "the folder does not exist: create it or choose another one",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another folder",
    errno.EISDIR: "there is a folder of that name: choose another name",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, which replaces `path` once the body has succeeded.

    The temporary file has the suffix of `path`, so that libraries that go by it write the right
    format. It reaches the disk (fsync) before it takes the name, and it is removed if the body
    raises; `path` is then as it was. A symbolic link is followed: its target is replaced.

    Args:
        path: the file to write; its folder must exist.

    Yields:
        The temporary path, at which the body writes the whole file.

    Raises:
        OSError: where the file cannot be written (full disk, unwritable or missing folder), with
            the path and the remedy; the subclass and `errno` of the cause are kept.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.stem[:80]}.{secrets.token_hex(4)}{target.suffix}")
    try:
        # Created at once: an unwritable folder shows before the body does its work.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
        _reach_disk(temporary)
        os.replace(temporary, target)
        if os.name == "posix":
            with suppress(OSError):  # the new name is there already; some systems refuse this
                _reach_disk(target.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        code = _cause(error, temporary, target)
        if code is not None:
            raise write_error(code, target) from error
        raise


def make_folder(folder: Path, name: str) -> None:
    """Make a folder, and those above it, unless it is there.

    Args:
        folder: the folder.
        name: what it is to the user, such as the option that names it.

    Raises:
        OSError: if it cannot be made, with the remedy.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot make {name} {folder} ({error.strerror}): choose another folder"
        ) from error


def write_error(code: int, path: Path) -> OSError:
    """An error that says that `path` cannot be written, why (an errno), and what to do."""
    remedy = _REMEDIES.get(code, "check the disk or choose another folder")
    return OSError(code, f"cannot write {path} ({os.strerror(code)}): {remedy}")


def _cause(error: BaseException, temporary: Path, target: Path) -> int | None:
    """The errno of a failed write to `temporary`; None if the body failed for its own reasons."""
    if isinstance(error, OSError) and error.errno is not None:
        ours = {None, str(temporary), str(target), str(target.parent)}
        name = error.filename
        return error.errno if (name if name is None else os.fspath(name)) in ours else None
    # Libraries with cores in C or Rust pass the system's message on in errors of their own.
    if isinstance(error, Exception):
        return next((code for code in _FULL if os.strerror(code) in str(error)), None)
    return None


def _reach_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
