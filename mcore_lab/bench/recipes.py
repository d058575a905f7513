"""How long recipes and lessons take, as a person waits for them: from the command to its end."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mcore_lab.errors import RankFailedError


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What `mcore-lab run NAME` took, with the start of Python and its imports."""

    name: str
    ranks: int
    seconds: float


def time_run(name: str, ranks: int, folder: Path) -> Timed:
    """Run a recipe or a lesson as it is, in a process of its own, and return what it took.

    A recipe writes its run, and the text that it has tokenised, into `folder`. Raises
    RankFailedError with what the command says if it fails.
    """
    return _timed(name, ranks, ["--run-dir", str(folder / name), "--data.cache-dir", str(folder)])


def time_lesson(name: str, ranks: int) -> Timed:
    """Do the same for a lesson, which writes nothing."""
    return _timed(name, ranks, [])


def _timed(name: str, ranks: int, options: list[str]) -> Timed:
    words = [sys.executable, "-m", "mcore_lab", "run", name, "--nproc", str(ranks), *options]
    started = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        said = done.stderr.strip().removeprefix("error: ")
        raise RankFailedError(f"{name} ended with status {done.returncode}: {said}")
    return Timed(name=name, ranks=ranks, seconds=seconds)
