"""Kill a run's ranks again and again: each restart loses little, and changes nothing."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from mcore_lab.checkpoint.difference import compared
from mcore_lab.checkpoint.folders import hidden_folders, latest_checkpoint, step_folder
from mcore_lab.config import Recipe, RunArguments
from mcore_lab.errors import RankFailedError
from mcore_lab.recipes.start import require_startable, run_rank
from mcore_lab.runtime import launch
from mcore_lab.training import RunFolder

_SAVE_EVERY = 2
_POLL_SECONDS = 0.002
_COMPARED = ("step", "loss", "grad_norm", "lr")


class SoakError(RankFailedError):
    """A restart that lost more than it may, or did not compute what a run left alone does."""


@dataclasses.dataclass(kw_only=True)
class SoakResult:
    """What became of a run whose ranks were killed."""

    recipe: str
    nproc: int
    save_every: int
    """Steps between two checkpoints."""
    at_most_lost: int
    """Steps that a restart may have to repeat: those between two checkpoints, and as many again
    where one of them may be on its way."""
    kills: int = 0
    in_saves: int = 0
    """Of the kills, how many came while a checkpoint was being written."""
    most_steps_lost: int = 0
    """Steps recorded and not saved when a kill came."""
    whole_runs: int = 0
    """How often the run came to its end, each time with the weights of one that was left alone."""


def soak(
    recipe: Recipe,
    nproc: int,
    kills: int,
    folder: Path,
    *,
    seed: int = 0,
    tell: Callable[[SoakResult], None] = lambda _: None,
) -> SoakResult:
    """Kill one random rank, or all, at `kills` random moments of runs in `folder`, on CPU.

    After each kill the run goes on from its last checkpoint; when it has come to its end it begins
    anew. What each step records, and the weights and moments at each end, are held against those of
    a run that was left alone, bit for bit. Raises SoakError at the first difference, and where a
    restart has more steps to repeat than it may have.
    """
    recipe = _saving(recipe)
    alone, killed = RunFolder(folder / "alone"), RunFolder(folder / "killed")
    started = time.monotonic()
    _launch(recipe, nproc, alone)
    seconds = time.monotonic() - started
    chance = random.Random(seed)
    every = recipe.checkpoint.save_every or 0
    may_lose = every * (2 if recipe.checkpoint.async_save else 1)
    result = SoakResult(recipe=recipe.name, nproc=nproc, save_every=every, at_most_lost=may_lose)
    while result.kills < kills or killed.holds_a_run:
        within = seconds if result.kills < kills else None
        with _Killer(chance, killed.checkpoints, within) as killer:
            try:
                _launch(recipe, nproc, killed)
            except RankFailedError:
                if not killer.has_killed:
                    raise
        if killer.has_killed:
            result.kills += 1
            result.in_saves += killer.hit_a_save
            result.most_steps_lost = max(result.most_steps_lost, _steps_lost(killed, result))
            tell(result)
        _require_same_steps(killed, alone)
        if step_folder(killed.checkpoints, recipe.training.steps).is_dir():
            _require_same_state(killed, alone, recipe.training.steps)
            result.whole_runs += 1
            shutil.rmtree(killed.path)
    return result


class _Killer:
    """A thread that kills ranks of this process at a random moment, unless they end before."""

    def __init__(self, chance: random.Random, checkpoints: Path, within: float | None) -> None:
        self.has_killed = self.hit_a_save = False
        self._checkpoints = checkpoints
        self._wait = None if within is None else chance.uniform(0, within)
        self._all, self._which = chance.random() < 0.25, chance.random()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._kill, name="killer")

    def __enter__(self) -> Self:
        if self._wait is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        if self._wait is not None:
            self._thread.join()

    def _kill(self) -> None:
        if self._is_over.wait(self._wait):
            return
        while not (ranks := multiprocessing.active_children()):
            if self._is_over.wait(_POLL_SECONDS):
                return
        if not self._all:
            ranks = [ranks[int(self._which * len(ranks))]]
        self.hit_a_save = bool(hidden_folders(self._checkpoints))
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank.pid or 0, signal.SIGKILL)
                self.has_killed = True


def _saving(recipe: Recipe) -> Recipe:
    """Return the recipe with checkpoints often, and all that it does not say of them as it is."""
    every = recipe.checkpoint.save_every or _SAVE_EVERY
    checkpoint = dataclasses.replace(recipe.checkpoint, save=True, save_every=every, keep=2)
    training = dataclasses.replace(recipe.training, resume="auto")
    return dataclasses.replace(recipe, checkpoint=checkpoint, training=training)


def _launch(recipe: Recipe, nproc: int, folder: RunFolder) -> None:
    arguments = RunArguments(recipe=recipe, run_dir=folder.path, json=True)
    require_startable(arguments, nproc)
    launch(run_rank, nproc, arguments)


def _steps_lost(killed: RunFolder, result: SoakResult) -> int:
    steps = [line["step"] for line in killed.metrics()]
    latest = latest_checkpoint(killed.checkpoints)
    saved = int(latest.name.rpartition("-")[2]) if latest else 0
    lost = (steps[-1] if steps else 0) - saved
    if lost > result.at_most_lost:
        raise SoakError(
            f"kill {result.kills} lost {lost} steps, and may lose {result.at_most_lost}: step "
            f"{steps[-1]} was taken, and step {saved} is the last that is saved"
        )
    return lost


def _require_same_steps(killed: RunFolder, alone: RunFolder) -> None:
    for line, expected in zip(killed.metrics(), alone.metrics(), strict=False):
        if off := [name for name in _COMPARED if line[name] != expected[name]]:
            raise SoakError(
                f"step {line['step']} has another {' and '.join(off)} than in a run left alone: "
                f"{_shown(line, off)}, not {_shown(expected, off)}"
            )


def _require_same_state(killed: RunFolder, alone: RunFolder, step: int) -> None:
    ours, theirs = (step_folder(folder.checkpoints, step) for folder in (killed, alone))
    if off := [tensor.name for tensor in compared(ours, theirs) if tensor.differs]:
        raise SoakError(
            f"{len(off)} tensors are not those of a run left alone, the first {off[0]}: {ours}"
        )


def _shown(line: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{line[name]}" for name in names)
