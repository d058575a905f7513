"""What becomes of checkpoints' folders: published, replaced, pruned, cleaned. No torch in here."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mcore_lab.checkpoint.folders import (
    LATEST,
    hidden,
    hidden_folders,
    replaced,
    step_folder,
    whole_checkpoints,
)
from mcore_lab.errors import CheckpointError

_REMOVING = "removes checkpoints"


def make_room(unfinished: Path, size: int) -> None:
    """Make the folder that a checkpoint of about `size` bytes is written to.

    Raises CheckpointError if there is not the room for it.
    """
    checkpoints = unfinished.parent
    clean_up(checkpoints)
    if not checkpoints.is_dir():
        checkpoints.mkdir(parents=True)
        sync(checkpoints.parent)
    unfinished.mkdir()
    free = shutil.disk_usage(unfinished).free
    if free < size:
        unfinished.rmdir()
        raise CheckpointError(
            f"cannot write the checkpoint to {checkpoints}: it takes {size / 1e6:,.1f} MB, "
            f"and {free / 1e6:,.1f} MB are free; --checkpoint.save False runs without checkpoints"
        )


def publish(unfinished: Path, folder: Path, step: int) -> None:
    """Let what was written whole, and is on disk, appear as `folder`, the latest checkpoint.

    At no moment is there half of a checkpoint in its place, whatever ends the process or the
    machine: what is there before and after is one rename apart, and on disk before the next.
    """
    if folder.exists():
        # Where a run that went on from an earlier step comes to this one again.
        folder.rename(replaced(folder))
    unfinished.rename(folder)
    sync(folder.parent)
    _mark_latest(folder.parent, step)
    shutil.rmtree(replaced(folder), ignore_errors=True)


def prune(
    checkpoints: Path, keep: int, latest: int | None = None, *, in_background: bool = False
) -> list[Path]:
    """Remove all but `keep` checkpoints, and return the folders that were removed.

    Those that go first are of steps after `latest`, which a run has left by going on from an
    earlier one; then the oldest. Raises CheckpointError if one cannot be removed. With
    `in_background` they are no checkpoints any more, and a thread gives their bytes back.
    """
    there = whole_checkpoints(checkpoints)
    last = max(there, default=0) if latest is None else latest
    steps = sorted(there, key=lambda step: (step <= last, step))
    surplus = [there[step] for step in steps[: max(0, len(steps) - keep)]]
    doomed = [_retired(folder) for folder in surplus]
    if in_background:
        # What it does not come to, the next save cleans up.
        threading.Thread(target=_remove_all, args=(doomed,), name=_REMOVING).start()
        return surplus
    for folder, retired in zip(surplus, doomed, strict=True):
        with _explained(folder):
            shutil.rmtree(retired)
    return surplus


def wait_for_removals() -> None:
    """Return when all that is removed in the background is gone."""
    for thread in threading.enumerate():
        if thread.name == _REMOVING:
            thread.join()


def clean_up(checkpoints: Path) -> None:
    """Remove what an interrupted save has left, and put back what it was about to replace."""
    whole = {folder: step for step, folder in whole_checkpoints(checkpoints).items()}
    for left in hidden_folders(checkpoints):
        if left not in whole:
            shutil.rmtree(left, ignore_errors=True)
    # Where nothing can be written, what stays is as good as it was.
    with suppress(OSError):
        (checkpoints / f".{LATEST}").unlink(missing_ok=True)
        for folder in whole.keys() & set(hidden_folders(checkpoints)):
            folder.rename(step_folder(checkpoints, whole[folder]))


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mark_latest(checkpoints: Path, step: int) -> None:
    beside = checkpoints / f".{LATEST}"
    beside.write_text(f"{step}\n", encoding="utf-8")
    sync(beside)
    beside.replace(checkpoints / LATEST)
    sync(checkpoints)


def _retired(folder: Path) -> Path:
    """Rename a checkpoint that is to be removed, so that no half of it is ever taken for one."""
    doomed = hidden(folder, "removed")
    with _explained(folder):
        folder.rename(doomed)
    return doomed


def _remove_all(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot remove the checkpoint {folder}: {error.strerror or error}"
        ) from None
