"""Runs whose ranks do something of their own between two steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from small_runs import launched_run

from mcore_lab.config import Recipe
from mcore_lab.training import recorder

Recorder = recorder.Recorder


def run_with(
    watcher: type[Recorder], recipe: Recipe, nproc: int, folder: Path, timeout: float = 120
) -> list[dict[str, Any]]:
    """Run the recipe with each rank's recorder in the place of which `watcher` is; see `run`."""
    return launched_run(_watched(watcher), recipe, nproc, folder, timeout=timeout)


def _watched(watcher: type[Recorder]) -> Callable[..., Any]:
    def rank(arguments: Any) -> Any:
        from mcore_lab.recipes.start import run_rank

        # A forked process of its own: nothing is to be put back.
        recorder.Recorder = watcher  # type: ignore[misc]
        return run_rank(arguments)

    return rank
