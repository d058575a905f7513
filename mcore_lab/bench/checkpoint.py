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
from mcore_lab.checkpoint.copies import Copies
from mcore_lab.checkpoint.load import load_checkpoint
from mcore_lab.checkpoint.manifest import files_in
from mcore_lab.checkpoint.publication import wait_for_removals
from mcore_lab.checkpoint.save import Save, begin_save, save_checkpoint
from mcore_lab.checkpoint.state import Progress
from mcore_lab.config import Recipe, recipe_to_toml
from mcore_lab.recipes.story import train
from mcore_lab.runtime import RankLog, process_group
from mcore_lab.training import RunFolder
from mcore_lab.training.console import Console
from mcore_lab.training.recorder import Recorder

_BYTES_AT_A_TIME = 2**23
_POLL_SECONDS = 0.001


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
    blocked_seconds: float
    """How long a run waits for a save of `--checkpoint.async`: to begin it, and to publish it."""
    disk_seconds: float
    """How long the disk takes for as many bytes, from one process, in one file, synced."""


def measure_on_rank(recipe: Recipe, rounds: int, folder: Path | None = None) -> CheckpointTimes:
    """Take a step, then save and load what it has led to, `rounds` times after a first.

    Each round also saves in the background, and writes as many bytes to the disk.

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
    return CheckpointTimes(
        recipe=recipe.name,
        rounds=rounds,
        size=recorder.size,
        **{f"{name}_seconds": statistics.median(s[1:]) for name, s in recorder.seconds.items()},
    )


class _SavingRecorder(Recorder):
    """Saves and loads when training has ended, and takes the times of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: dict[str, list[float]] = {
            name: [] for name in ("save", "load", "blocked", "disk")
        }
        self.rounds = self.size = 0
        self.toml = ""

    def look_at_end(self, model: Any, optimizer: Any, scheduler: Any) -> None:
        where, copies = [self.folder.checkpoints], Copies()
        dist.broadcast_object_list(where)
        run, took = (model, optimizer, scheduler), self.seconds

        def saving(save: Callable[..., Any], step: int, **kwargs: Any) -> Any:
            folder = step_folder(where[0], step)
            kwargs |= {"keep": 1, "is_first": step == 1}
            return partial(save, folder, *run, Progress(step, step), self.toml, **kwargs)

        for step in range(1, 2 * self.rounds + 2, 2):
            took["save"].append(_seconds(saving(save_checkpoint, step)))
            folder = step_folder(where[0], step)
            took["load"].append(_seconds(partial(load_checkpoint, folder, *run)))
            self.size = sum(file.stat().st_size for file in files_in(folder).values())
            blocked = _blocked_seconds(saving(begin_save, step + 1, copies=copies))
            took["blocked"].append(blocked)
            took["disk"].append(_seconds(partial(_write, where[0] / "bytes", self.size)))
        wait_for_removals()
        dist.barrier()  # The checkpoints are gone when rank 0 has ended.


def _blocked_seconds(begin: Callable[[], Save]) -> float:
    """Save in the background, and return how long the ranks cannot go on for it."""
    begun: list[Save] = []
    to_begin = _seconds(lambda: begun.append(begin()))
    while not begun[0].is_written:
        time.sleep(_POLL_SECONDS)
    return to_begin + _seconds(begun[0].finish)


def _write(file: Path, size: int) -> None:
    """Write so many bytes to the disk, on rank 0."""
    if dist.get_rank() != 0:
        return
    some = os.urandom(_BYTES_AT_A_TIME)
    with file.open("wb", buffering=0) as stream:
        for start in range(0, size, len(some)):
            stream.write(some[: size - start])
        os.fsync(stream.fileno())
    file.unlink()


def _seconds(body: Callable[[], object]) -> float:
    dist.barrier()
    started = time.perf_counter()
    body()
    dist.barrier()
    return time.perf_counter() - started
