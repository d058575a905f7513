"""Where a run's checkpoints are, and whether a folder holds one. No torch in here."""

from __future__ import annotations

from pathlib import Path

from mcore_lab.errors import CheckpointError

_PREFIX = "step-"
_METADATA = "metadata.json"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return checkpoints / f"{_PREFIX}{step:08d}"


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """Return the checkpoint of the highest step that was written whole, if there is one."""
    whole = [folder for folder in checkpoints.glob(f"{_PREFIX}*") if (folder / _METADATA).is_file()]
    return max(whole, default=None)


def require_checkpoint(path: Path) -> Path:
    """Return the checkpoint at `path`: itself, or the latest in a run folder or a checkpoints folder.

    Raises CheckpointError if there is none.
    """
    if (path / _METADATA).is_file():
        return path
    for folder in (path, path / "checkpoints"):
        found = latest_checkpoint(folder)
        if found:
            return found
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {path}: no such folder")
    raise CheckpointError(
        f"there is no checkpoint at {path}: neither {_METADATA} nor a folder {_PREFIX}N is in it"
    )


def starting_point(load: str | None, resume: str, checkpoints: Path) -> Path | None:
    """Return the checkpoint that a run starts from, if any; `checkpoints` is the run's own folder.

    `resume` is `none`, `auto` (the latest of the run itself) or a path; `load` is a path. Raises
    CheckpointError if one is named that is not there.
    """
    if resume == "auto":
        return latest_checkpoint(checkpoints)
    named = load if resume == "none" else resume
    return require_checkpoint(Path(named)) if named else None
