"""Where a run's checkpoints are, and whether a folder holds one. No torch in here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from mcore_lab.errors import CheckpointError

LATEST = "latest_checkpointed_iteration.txt"
"""Holds the step of the checkpoint that was published last; the name is Megatron-LM's."""

_PREFIX = "step-"
_MARK = "metadata.json"
_TENSORS = ".metadata"
_REPLACED = "replaced"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return checkpoints / f"{_PREFIX}{step:08d}"


def hidden(folder: Path, what: str) -> Path:
    """Return the folder beside a checkpoint for what is no longer, or not yet, one."""
    return folder.with_name(f".{folder.name}.{what}")


def replaced(folder: Path) -> Path:
    """Return where a checkpoint lies while another takes its place."""
    return hidden(folder, _REPLACED)


def hidden_folders(checkpoints: Path) -> list[Path]:
    """Return all that a save, or the removal of a checkpoint, has left when it was interrupted."""
    return list(checkpoints.glob(f".{_PREFIX}*"))


def whole_checkpoints(checkpoints: Path) -> dict[int, Path]:
    """Return the checkpoints that were written whole, by step, in the order of steps.

    One that was to be replaced when a save was interrupted is among them where it still lies.
    """
    pattern = rf"{_PREFIX}(\d+)|\.{_PREFIX}(\d+)\.{_REPLACED}"
    # What is hidden sorts first: a checkpoint in its place goes before the one it replaced.
    whole = {
        int(match[1] or match[2]): folder
        for folder in sorted(checkpoints.glob(f"*{_PREFIX}*"))
        if (match := re.fullmatch(pattern, folder.name)) and (folder / _MARK).is_file()
    }
    return dict(sorted(whole.items()))


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """Return the checkpoint that was published last, if there is one.

    That is not the highest step where a run has gone on from an earlier one. Where nothing, or
    something that is gone, is marked as the latest, it is the highest.
    """
    whole = whole_checkpoints(checkpoints)
    marked = whole.get(_marked(checkpoints))
    return marked or (whole[max(whole)] if whole else None)


def require_checkpoint(path: Path) -> Path:
    """Return the checkpoint at `path`: itself, or the latest in a run's or a checkpoints folder.

    Raises CheckpointError if there is none, or if it can be seen at once that it is damaged.
    """
    candidates = (latest_checkpoint(path), latest_checkpoint(path / "checkpoints"))
    found = path if (path / _MARK).is_file() else next(filter(None, candidates), None)
    if found:
        return _require_intact(found)
    if not path.exists():
        named = Path("runs") / path
        hint = f"; did you mean {named}?" if latest_checkpoint(named / "checkpoints") else ""
        raise CheckpointError(f"there is no checkpoint at {path}: no such folder{hint}")
    raise CheckpointError(
        f"there is no checkpoint at {path}: neither {_MARK} nor a folder {_PREFIX}N is in it"
    )


def checkpoints_folder(run: Path) -> Path:
    """Return where the checkpoints of a run are: in its folder, or this folder itself.

    Raises CheckpointError if there is none.
    """
    for folder in (run / "checkpoints", run):
        if whole_checkpoints(folder):
            return folder
    raise CheckpointError(f"there is no checkpoint in {run}")


class Start(NamedTuple):
    """A checkpoint that a run starts from."""

    path: Path
    weights_only: bool
    """Whether the run begins anew with its weights, or goes on where it left off."""


def starting_point(load: str | None, resume: str, checkpoints: Path) -> Start | None:
    """Return the checkpoint that a run starts from, if any; `checkpoints` is the run's own folder.

    `resume` is `none`, `auto` (the latest of the run itself) or a path, and goes before `load`, a
    path to weights to begin with. Raises CheckpointError if a path holds none, or a damaged one.
    """
    if resume == "auto" and (latest := latest_checkpoint(checkpoints)):
        return Start(_require_intact(latest), weights_only=False)
    if resume not in ("auto", "none"):
        return Start(require_checkpoint(Path(resume)), weights_only=False)
    return Start(require_checkpoint(Path(load)), weights_only=True) if load else None


def _marked(checkpoints: Path) -> int:
    try:
        return int((checkpoints / LATEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return -1


def _require_intact(path: Path) -> Path:
    """Look at what Megatron-Core and torch keep beside the tensors; the tensors are read later."""
    try:
        kind = json.loads((path / _MARK).read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, TypeError, KeyError):
        raise CheckpointError(f"cannot read the checkpoint {path}: {_MARK} is damaged") from None
    if kind != "torch_dist":
        raise CheckpointError(
            f"cannot read the checkpoint {path}: its format is {kind}, not torch_dist"
        )
    tensors = path / _TENSORS
    if not tensors.is_file() or tensors.stat().st_size == 0:
        what = "empty" if tensors.is_file() else "missing"
        raise CheckpointError(f"cannot read the checkpoint {path}: {_TENSORS} is {what}")
    return path
