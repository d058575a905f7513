"""A run's checkpoints, one after the other: written at once, or while the run goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mcore_lab.checkpoint.copies import Copies
from mcore_lab.checkpoint.folders import step_folder
from mcore_lab.checkpoint.save import Save, begin_save
from mcore_lab.checkpoint.state import Progress
from mcore_lab.errors import CheckpointError


class Saver:
    """Saves a run's checkpoints; at most one is on its way.

    `run` is the model's chunks, the optimizer and the scheduler; `recipe` is its TOML. `saved` is
    told of each checkpoint that is whole, and `not_saved` of the failure of one that the run can
    miss; any other is raised, on every rank.
    """

    def __init__(
        self,
        checkpoints: Path,
        run: tuple[Sequence[Any], Any, Any],
        recipe: str,
        *,
        keep: int | None,
        in_background: bool,
        saved: Callable[[Path], None],
        not_saved: Callable[[CheckpointError], None],
    ) -> None:
        self._checkpoints = checkpoints
        self._run, self._recipe, self._keep = run, recipe, keep
        self._saved, self._not_saved = saved, not_saved
        self._copies = Copies() if in_background else None
        self._is_first = True
        self._on_its_way: Save | None = None
        self._can_miss = False

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes its part of a checkpoint."""
        return self._on_its_way is not None and not self._on_its_way.is_written

    def save(self, progress: Progress, *, can_miss: bool = False) -> None:
        """Save, or begin to; every rank calls this. One that is on its way is ended first."""
        self.settle()
        self._can_miss = can_miss
        folder = step_folder(self._checkpoints, progress.step)
        try:
            self._on_its_way = begin_save(
                folder,
                *self._run,
                progress,
                self._recipe,
                keep=self._keep,
                is_first=self._is_first,
                copies=self._copies,
            )
            self._is_first = False
        except CheckpointError as error:
            self._miss(error)
        if not self._copies:
            self.settle()

    def settle(self) -> None:
        """Wait for the checkpoint that is on its way, if one is; every rank calls this."""
        if (save := self._on_its_way) is None:
            return
        self._on_its_way = None
        try:
            self._saved(save.finish())
        except CheckpointError as error:
            self._miss(error)

    def _miss(self, error: CheckpointError) -> None:
        if not self._can_miss:
            raise error
        self._not_saved(error)
