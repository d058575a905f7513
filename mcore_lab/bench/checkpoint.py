"""What a checkpoint costs: how long training waits for a save, and how long a load takes."""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mcore_lab.checkpoint import step_folder
from mcore_lab.checkpoint.load import load_checkpoint
from mcore_lab.checkpoint.manifest import files_in
from mcore_lab.checkpoint.save import save_checkpoint
from mcore_lab.checkpoint.state import Progress
from mcore_lab.config import Recipe, recipe_to_toml
from mcore_lab.recipes.story import train
from mcore_lab.runtime import RankLog, process_group
from mcore_lab.training import RunFolder
from mcore_lab.training.console import Console
from mcore_lab.training.recorder import Recorder


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointTimes:
    """Medians over rounds, from when every rank begins to when every rank has ended."""

    recipe: str
    rounds: int
    size: int
    """Bytes of the checkpoint: weights, optimizer and what describes them."""
    save_seconds: float
    """Planned, written, hashed, on disk and published."""
    load_seconds: float
    """Held against its hashes, and read into the model and the optimizer."""


def measure_on_rank(recipe: Recipe, rounds: int, folder: Path | None = None) -> CheckpointTimes:
    """Take a step, then save and load what it has led to, `rounds` times after a first.

    The checkpoints are written to a new folder in `folder`, or in the folder for temporary files.
    """
    checkpoint = dataclasses.replace(recipe.checkpoint, save=False)
    training = dataclasses.replace(recipe.training, steps=1)
    recipe = dataclasses.replace(recipe, checkpoint=checkpoint, training=training)
    with (
        RankLog(int(os.environ.get("RANK", "0"))) as log,
        process_group() as world,
        Console(speaks=False) as console,
        tempfile.TemporaryDirectory(prefix="mcore_lab-", dir=folder) as own,
    ):
        # Each rank has a log, and rank 0 the checkpoints, in a folder of its own.
        recorder = _SavingRecorder(
            RunFolder(Path(own) / "run"), log, console, recipe_toml="", fresh=True
        )
        recorder.rounds, recorder.toml = rounds, recipe_to_toml(recipe)
        train(recipe, world, recorder)
    saves, loads = recorder.saves[1:], recorder.loads[1:]
    return CheckpointTimes(
        recipe=recipe.name,
        rounds=rounds,
        size=recorder.size,
        save_seconds=statistics.median(saves),
        load_seconds=statistics.median(loads),
    )


class _SavingRecorder(Recorder):
    """Saves and loads when training has ended, and takes the times of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.saves: list[float] = []
        self.loads: list[float] = []
        self.rounds = self.size = 0
        self.toml = ""

    def look_at_end(self, model: Any, optimizer: Any, scheduler: Any) -> None:
        where = [self.folder.checkpoints]
        dist.broadcast_object_list(where)
        for step in range(1, self.rounds + 2):
            folder = step_folder(where[0], step)
            run = (model, optimizer, scheduler)
            progress = Progress(step, step)
            save = partial(save_checkpoint, folder, *run, progress, self.toml, keep=1)
            self.saves.append(_seconds(save))
            self.loads.append(_seconds(partial(load_checkpoint, folder, *run)))
        self.size = sum(file.stat().st_size for file in files_in(folder).values())
        dist.barrier()  # The checkpoints are gone when rank 0 has ended.


def _seconds(body: Callable[[], object]) -> float:
    dist.barrier()
    started = time.perf_counter()
    body()
    dist.barrier()
    return time.perf_counter() - started
