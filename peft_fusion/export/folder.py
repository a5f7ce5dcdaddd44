"""A folder that appears whole or not at all: it is written beside its place and then renamed.

Two renames put a new folder in the place of an old one. Between them the old one lies at `.NAME.replaced`, the new one
beside it, both whole; what is found there by a later call is put back first.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIG = "config.json"


def check_free(directory: Path, overwrite: bool) -> None:
    """Refuses a place that is taken, before anything is written.

    Args:
        directory: the place.
        overwrite: whether a model that is there may be replaced.

    Raises:
        ValueError: if it is a file, or a folder that is not empty and may not be replaced, or none can be made there.
    """
    _check_writable(directory)
    restore_replaced(directory)
    if not os.path.lexists(directory) or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not directory.is_dir() or directory.is_symlink():
        raise ValueError(f"{directory} is a file or a link. Name a folder that is not there yet.")
    if not overwrite:
        raise ValueError(f"{directory} exists already. Name another folder, or replace it by `overwrite=True`.")
    if not (directory / CONFIG).is_file():
        raise ValueError(f"{directory} has no {CONFIG}, so it is no model to overwrite. Name another folder.")


@contextmanager
def written_whole(directory: Path) -> Iterator[Path]:
    """A new folder to write in, which takes its place when the block is over; nothing of it is left after an error.

    Args:
        directory: its place, for which `check_free` was called.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{directory.name}.export-", dir=directory.parent))
    try:
        yield new
        _make_durable(new)
        new.chmod(0o777 & ~_umask())
        _put(new, directory)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def restore_replaced(directory: Path) -> None:
    """Puts a folder back that an export was about to replace when it was killed."""
    aside = _aside(directory)
    if aside.is_dir() and not os.path.lexists(directory):
        aside.rename(directory)


def _put(new: Path, directory: Path) -> None:
    """Renames a folder to its place; one that is there is moved aside first, and removed last."""
    aside = _aside(directory)
    restore_replaced(directory)
    shutil.rmtree(aside, ignore_errors=True)  # of a call that was killed after its second rename
    if directory.is_dir() and any(directory.iterdir()):
        directory.rename(aside)
    try:
        new.rename(directory)
    except BaseException:
        restore_replaced(directory)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _aside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.replaced")


def _check_writable(directory: Path) -> None:
    """Refuses a place beside which no folder can be made, by making one.

    Raises:
        ValueError: naming the folder above it that is in the way.
    """
    above = next(path for path in directory.absolute().parents if os.path.lexists(path))
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{directory.name}.export-", dir=above))
    except OSError as error:
        raise ValueError(
            f"{directory} cannot be made, for nothing can be written in {above} ({error.strerror}). Name a folder "
            "elsewhere."
        ) from error


def _make_durable(folder: Path) -> None:
    """Has the disk hold every file before the folder takes its place, so that a power cut leaves no empty ones."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as opened:
                os.fsync(opened.fileno())


def _umask() -> int:
    """The permissions that new files do not get; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
