"""Where a run's checkpoints are, and whether a folder holds one. No torch in here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from mcore_lab.errors import CheckpointError

_PREFIX = "step-"
_MARK = "metadata.json"
_TENSORS = ".metadata"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return checkpoints / f"{_PREFIX}{step:08d}"


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """Return the checkpoint of the highest step that was written whole, if there is one."""
    whole = {
        int(match[1]): folder
        for folder in checkpoints.glob(f"{_PREFIX}*")
        if (match := re.fullmatch(rf"{_PREFIX}(\d+)", folder.name)) and (folder / _MARK).is_file()
    }
    return whole[max(whole)] if whole else None


def require_checkpoint(path: Path) -> Path:
    """Return the checkpoint at `path`: itself, or the latest in a run's or a checkpoints folder.

    Raises CheckpointError if there is none, or if it can be seen at once that it is damaged.
    """
    candidates = (latest_checkpoint(path), latest_checkpoint(path / "checkpoints"))
    found = path if (path / _MARK).is_file() else next(filter(None, candidates), None)
    if found:
        return _require_intact(found)
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {path}: no such folder")
    raise CheckpointError(
        f"there is no checkpoint at {path}: neither {_MARK} nor a folder {_PREFIX}N is in it"
    )


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
