"""What commands share that look at runs: the folder of one, or what there is instead."""

from __future__ import annotations

from pathlib import Path

from mcore_lab.errors import RunFolderError, nearest
from mcore_lab.training import RunFolder


def run_in(path: Path) -> RunFolder:
    """Return the run's folder, or raise RunFolderError with the runs that are near."""
    folder = RunFolder(path)
    if not folder.holds_a_run:
        raise RunFolderError(f"no run in {path}{_runs_near(path)}")
    return folder


def _runs_near(path: Path) -> str:
    """Return which runs there are beside a path and in runs/, or nothing."""
    parents = [parent for parent in {path.parent, Path("runs")} if parent.is_dir()]
    folders = {folder for parent in parents for folder in parent.iterdir()}
    found = sorted(str(folder) for folder in folders if RunFolder(folder).holds_a_run)
    return nearest(str(path), found) or (f"; there is {', '.join(found[:5])}" if found else "")
