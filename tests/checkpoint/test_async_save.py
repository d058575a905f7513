"""`--checkpoint.async`: the state at the save is written, whatever the run does meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SMALL, changed, launched_run, losses, run

from mcore_lab.checkpoint import save as saving
from mcore_lab.checkpoint.copies import Copies
from mcore_lab.checkpoint.difference import compared
from mcore_lab.checkpoint.integrity import differences
from mcore_lab.config import Recipe, RunArguments
from mcore_lab.errors import CheckpointError
from mcore_lab.recipes.start import run_rank
from mcore_lab.training import RunFolder

TP2 = {"tensor_model_parallel_size": 2}
SECONDS = 60


def recipe(steps: int, **checkpoint: Any) -> Recipe:
    return changed(
        SMALL,
        training={"steps": steps},
        checkpoint={"save_every": 2, "async_save": True} | checkpoint,
        layout=TP2,
    )


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose checkpoints were written while it waited."""
    folder = tmp_path_factory.mktemp("at_once") / "run"
    run(recipe(6, async_save=False), 2, folder)
    return folder


def run_late(arguments: RunArguments, before_writing: Callable[[Path, int], None]) -> None:
    """Run, and call a function before each save's shards are written, in the thread that does."""
    write = saving.write_shards

    def write_late(planned: Any, buckets: Any) -> Any:
        if buckets:
            step = int(Path(buckets[0][0]).parent.name.split(".")[1].removeprefix("step-"))
            before_writing(arguments.run_dir, step)
        return write(planned, buckets)

    saving.write_shards = write_late
    run_rank(arguments)


def until_the_run_has_taken_a_step_more(folder: Path, step: int) -> None:
    deadline = time.monotonic() + SECONDS
    while step < 6 and len(RunFolder(folder).metrics()) < step + 1:
        assert time.monotonic() < deadline, "the run waits for its checkpoint"
        time.sleep(0.01)


def rank_late(before_writing: Callable[[Path, int], None]) -> Callable[[RunArguments], None]:
    return lambda arguments: run_late(arguments, before_writing)


def test_the_run_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(
    at_once: Path, tmp_path: Path
) -> None:
    late = rank_late(until_the_run_has_taken_a_step_more)
    metrics = launched_run(late, recipe(6), 2, tmp_path / "run")
    assert losses(metrics) == losses(RunFolder(at_once).metrics())
    for step in ("step-00000002", "step-00000004", "step-00000006"):
        written, expected = (run / "checkpoints" / step for run in (tmp_path / "run", at_once))
        assert differences(written) == []
        assert not [tensor.name for tensor in compared(written, expected) if tensor.differs]


def test_one_that_fails_in_the_background_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step-00000004: .*No such file or directory"):
        launched_run(rank_late(vanish_at_4), recipe(6), 2, tmp_path / "run")


def test_one_that_may_fail_in_the_background_is_missed_and_the_next_is_written(
    tmp_path: Path,
) -> None:
    metrics = launched_run(
        rank_late(vanish_at_4), recipe(6, on_failure="continue"), 2, tmp_path / "run"
    )
    assert len(metrics) == 6
    (only,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert only.name == "step-00000006" and differences(only) == []
    log = (tmp_path / "run" / "logs" / "rank-1.log").read_text()
    assert "cannot write the checkpoint" in log and "step-00000004" in log


def vanish_at_4(folder: Path, step: int) -> None:
    """Take the folder away from under the save."""
    if step == 4 and os.environ["RANK"] == "1":
        (folder / "checkpoints").rename(folder / "gone")


def test_copies_stay_what_they_were_and_take_new_memory_only_where_there_is_none() -> None:
    copies = Copies()
    weight, bias = torch.ones(3, 2), torch.ones(3)
    first = copies.make([weight, bias])
    weight.fill_(2)
    bias.fill_(2)
    assert [one.unique().tolist() for one in first] == [[1], [1]]
    memory = [one.data_ptr() for one in first]
    assert [one.data_ptr() for one in copies.make([weight, bias])] == memory
    assert [one.unique().tolist() for one in first] == [[2], [2]]
    longer = copies.make([weight, torch.ones(4), bias.double()])
    assert [(one.shape, one.dtype) for one in longer] == [
        (weight.shape, torch.float32),
        ((4,), torch.float32),
        (bias.shape, torch.float64),
    ]
    assert longer[0].data_ptr() == memory[0]
