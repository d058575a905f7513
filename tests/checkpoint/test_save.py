"""A checkpoint appears when it is whole, or not at all."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from disks import small_disk
from small_runs import SMALL, changed, losses, run

from mcore_lab.config import Recipe, RunArguments
from mcore_lab.errors import CheckpointError, RankFailedError
from mcore_lab.recipes.start import run_rank
from mcore_lab.runtime import launch, process_group

TP2 = {"tensor_model_parallel_size": 2}
SHARD_BYTES = 65536


def recipe(steps: int, resume: str = "none", **parts: dict[str, Any]) -> Recipe:
    training = {"steps": steps, "resume": resume}
    return changed(SMALL, training=training, checkpoint={"save_every": 2}, **parts)


def steps_saved(folder: Path) -> list[str]:
    checkpoints = (folder / "checkpoints").iterdir()
    return sorted(path.name for path in checkpoints if path.is_dir())


def test_checkpoints_are_written_every_so_many_steps_and_after_the_last(tmp_path: Path) -> None:
    run(recipe(5), 1, tmp_path)
    assert steps_saved(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]


def test_a_run_that_saves_nothing_has_no_checkpoints(tmp_path: Path) -> None:
    run(changed(recipe(2), checkpoint={"save": False}), 1, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_step_that_is_taken_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    run(recipe(4), 1, tmp_path)
    last = tmp_path / "checkpoints" / "step-00000004"
    before = last.stat().st_ino
    middle = str(tmp_path / "checkpoints" / "step-00000002")
    again = run(recipe(4, resume=middle), 1, tmp_path)
    assert len(again) == 4
    assert last.stat().st_ino != before
    assert steps_saved(tmp_path) == ["step-00000002", "step-00000004"]


# No process.


def test_a_save_starts_no_process_that_outlives_it_and_imports_nothing_anew(tmp_path: Path) -> None:
    """Megatron-Core's own writer starts a process through spawn, which imports all of it again."""

    def watched() -> tuple[list[str], list[str]]:
        started: list[str] = []

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn"):
                started.append(f"{event} {arguments[0]}")

        # What spawn starts goes by none of these events, but through this function.
        import multiprocessing.util as spawning

        spawn = spawning.spawnv_passfds

        def counted(path: Any, *arguments: Any) -> int:
            started.append(f"spawn {path}")
            return spawn(path, *arguments)

        spawning.spawnv_passfds = counted
        sys.addaudithook(hook)
        run_rank(RunArguments(recipe=recipe(2), run_dir=tmp_path / "run", json=True))
        left = [child.name() for child in psutil.Process().children(recursive=True)]
        return started, left

    assert launch(watched, 1, timeout=60) == [([], [])]
    assert steps_saved(tmp_path / "run") == ["step-00000002"]


# Killed in the middle.


def killed_while_writing(arguments: RunArguments, rank: int) -> None:
    """Run until `rank` opens its first shard of step 4, which kills it."""
    pid = os.getpid()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (
            event == "open"
            and "step-00000004" in str(arguments[0])
            and ".distcp" in str(arguments[0])
        ):
            os.kill(pid, signal.SIGKILL)

    if int(os.environ["RANK"]) == rank:
        sys.addaudithook(hook)
    run_rank(arguments)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_that_is_killed_is_not_taken_for_a_checkpoint(tmp_path: Path, rank: int) -> None:
    whole = run(recipe(6, layout=TP2), 2, tmp_path / "whole")
    arguments = RunArguments(recipe=recipe(6, layout=TP2), run_dir=tmp_path / "run", json=True)
    with pytest.raises(RankFailedError, match=f"rank {rank} was killed by SIGKILL"):
        launch(killed_while_writing, 2, arguments, rank, timeout=60)
    assert "step-00000004" not in steps_saved(tmp_path / "run")

    metrics = run(recipe(6, resume="auto", layout=TP2), 2, tmp_path / "run")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert losses(metrics) == pytest.approx(losses(whole), rel=1e-6)
    assert steps_saved(tmp_path / "run") == ["step-00000002", "step-00000004", "step-00000006"]


# What is no whole.


def test_of_a_first_save_it_is_checked_that_ranks_hold_each_part_once(tmp_path: Path) -> None:
    from mcore_lab.checkpoint.write import plan

    def both_hold_the_first_half() -> None:
        from megatron.core.dist_checkpointing import ShardedTensor

        with process_group():
            half = ShardedTensor.from_rank_offsets("weight", torch.ones(2), (0, 0, 2))
            plan({"weight": half}, tmp_path, {}, check=True)

    with pytest.raises(RankFailedError, match="Invalid access pattern for ShardedTensor"):
        launch(both_hold_the_first_half, 2, timeout=60)


def test_a_run_checks_its_first_save_alone(tmp_path: Path) -> None:
    """The parts are the same in all of them, and to check is a seventh of a small save."""

    def counted() -> int:
        checked = 0

        def hook(frame: Any, event: str, _: Any) -> None:
            nonlocal checked
            checked += event == "call" and frame.f_code.co_name == "validate_sharding_integrity"

        sys.setprofile(hook)
        run_rank(RunArguments(recipe=recipe(6), run_dir=tmp_path / "run", json=True))
        sys.setprofile(None)
        return checked

    assert launch(counted, 1, timeout=60) == [1]
    assert len(steps_saved(tmp_path / "run")) == 3


# What cannot be written.


def test_a_checkpoints_folder_that_cannot_be_made_is_an_error_with_the_reason(
    tmp_path: Path,
) -> None:
    run(changed(recipe(0), checkpoint={"save": False}), 1, tmp_path / "run")
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*/step-00000002: .*"):
        run(recipe(2, resume="auto"), 2, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints").read_text() == "in the way"


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_shard_that_cannot_be_written_is_an_error_with_the_reason_and_leaves_nothing(
    tmp_path: Path, nproc: int
) -> None:
    def limited(arguments: RunArguments) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD_BYTES, SHARD_BYTES))
        run_rank(arguments)

    layout = TP2 if nproc == 2 else {}
    arguments = RunArguments(recipe=recipe(2, layout=layout), run_dir=tmp_path / "run", json=True)
    with pytest.raises(CheckpointError) as raised:
        launch(limited, nproc, arguments, timeout=60)
    message = str(raised.value)
    assert message.startswith(
        f"cannot write the checkpoint {tmp_path}/run/checkpoints/step-0000000"
    )
    # From 0.17 on Megatron-Core passes on no more of a writer's error than its type.
    reasons = ("File too large", "a limit on the size of files", "<class 'OSError'>")
    assert any(reason in message for reason in reasons)
    assert "\n" not in message
    assert steps_saved(tmp_path / "run") == []


def test_a_disk_without_room_is_found_before_anything_is_written(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "256k") as disk:
        with pytest.raises(CheckpointError) as raised:
            run(recipe(2, layout=TP2), 2, disk / "run")
        message = str(raised.value)
        assert message.startswith(
            f"cannot write the checkpoint to {disk}/run/checkpoints: it takes "
        )
        assert "MB are free" in message and "--checkpoint.save False" in message
        assert steps_saved(disk / "run") == []
