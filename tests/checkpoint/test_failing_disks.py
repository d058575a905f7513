"""What becomes of a run whose disk fails while it saves: real disks, and real failures."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disks import small_disk
from small_runs import SMALL, changed, losses, run

from mcore_lab.checkpoint.integrity import differences
from mcore_lab.config import Recipe, RunArguments
from mcore_lab.errors import CheckpointError
from mcore_lab.recipes.start import run_rank
from mcore_lab.runtime import launch
from mcore_lab.training import RunFolder

TP2 = {"tensor_model_parallel_size": 2}
TIMEOUT = 300
FAILING_STEP = "step-00000004"


def recipe(steps: int, **checkpoint: Any) -> Recipe:
    return changed(
        SMALL, training={"steps": steps}, checkpoint={"save_every": 2} | checkpoint, layout=TP2
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps that keeps two checkpoints."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(recipe(6, keep=2), 2, folder, timeout=TIMEOUT)
    return folder


def steps_saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())


def fill(disk: Path) -> None:
    """Leave no room on the disk."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"0" * 4096)
        except OSError:
            pass


def run_disturbed(
    arguments: RunArguments, rank: int, disturb: Callable[[], object], restore: Callable[[], object]
) -> None:
    """Run; when `rank` opens its first shard of step 4 disturb, and after that step restore."""
    state = "before"

    def hook(event: str, opened: tuple[Any, ...]) -> None:
        nonlocal state
        name = str(opened[0]) if event == "open" else ""
        if state == "before" and FAILING_STEP in name and ".distcp" in name:
            state = "disturbed"
            disturb()
        elif state == "disturbed" and "metrics.jsonl" in name:
            state = "restored"
            restore()

    if int(os.environ["RANK"]) == rank:
        sys.addaudithook(hook)
    run_rank(arguments)


def disturbed(
    folder: Path,
    steps: int,
    rank: int,
    disturb: Callable[[], object],
    restore: Callable[[], object] = lambda: None,
    **checkpoint: Any,
) -> str:
    """Return rank 1's log of a run on two ranks of which `rank` meets with a failing disk."""
    arguments = RunArguments(recipe=recipe(steps, **checkpoint), run_dir=folder, json=True)
    launch(run_disturbed, 2, arguments, rank, disturb, restore, timeout=TIMEOUT)
    return (folder / "logs" / "rank-1.log").read_text()


def test_a_run_that_is_to_go_on_misses_a_checkpoint_on_a_full_disk_and_writes_the_next(
    undisturbed: Path, tmp_path: Path
) -> None:
    """Rank 0 meets with the full disk: the other one is told, and does not wait for it."""
    with small_disk(tmp_path / "disk", "8m") as disk:
        log = disturbed(
            disk / "run",
            6,
            0,
            lambda: fill(disk),
            lambda: (disk / "filler").unlink(),
            on_failure="continue",
        )
        assert steps_saved(disk / "run") == ["step-00000002", "step-00000006"]
        for step in steps_saved(disk / "run"):
            assert differences(disk / "run" / "checkpoints" / step) == []
        assert losses(RunFolder(disk / "run").metrics()) == losses(RunFolder(undisturbed).metrics())
    assert f"cannot write the checkpoint {disk}/run/checkpoints/{FAILING_STEP}: " in log
    assert "No space left on device" in log or "a full disk" in log


def test_a_run_that_is_to_stop_ends_on_a_full_disk_with_the_last_checkpoint_as_it_was(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        with pytest.raises(CheckpointError) as raised:
            disturbed(disk / "run", 6, 1, lambda: fill(disk))
        assert steps_saved(disk / "run") == ["step-00000002"]
        assert differences(disk / "run" / "checkpoints" / "step-00000002") == []
    message = str(raised.value)
    assert message.startswith(f"cannot write the checkpoint {disk}/run/checkpoints/{FAILING_STEP}")
    assert "No space left on device" in message or "a full disk" in message
    assert "\n" not in message


def test_a_folder_that_vanishes_during_a_save_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    log = disturbed(
        tmp_path / "run", 6, 1, lambda: checkpoints.rename(tmp_path / "gone"), on_failure="continue"
    )
    assert f"cannot write the checkpoint {checkpoints / FAILING_STEP}: " in log
    assert "No such file or directory" in log
    assert steps_saved(tmp_path / "run") == ["step-00000006"]
    assert differences(checkpoints / "step-00000006") == []


def test_the_last_checkpoint_cannot_be_missed(tmp_path: Path) -> None:
    """There is no later one that would hold what the run has learned, nor any before it."""
    checkpoints = tmp_path / "run" / "checkpoints"
    with pytest.raises(CheckpointError, match=f"{FAILING_STEP}: .*No such file or directory"):
        disturbed(
            tmp_path / "run",
            4,
            0,
            lambda: checkpoints.rename(tmp_path / "gone"),
            on_failure="continue",
        )


def test_a_read_only_folder_is_one_clear_error(tmp_path: Path) -> None:
    run(changed(recipe(0), checkpoint={"save": False}), 2, tmp_path / "run")
    with small_disk(tmp_path / "run" / "checkpoints", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, timeout=30)
        with pytest.raises(CheckpointError) as raised:
            run(changed(recipe(2), training={"resume": "auto"}), 2, tmp_path / "run")
    reason = "[Errno 30] Read-only file system: "
    assert str(raised.value).startswith(
        f"cannot write the checkpoint {disk}/step-00000002: {reason}"
    )


def test_old_checkpoints_go_when_the_new_one_is_there(undisturbed: Path) -> None:
    assert steps_saved(undisturbed) == ["step-00000004", "step-00000006"]
    assert not list((undisturbed / "checkpoints").glob(".*"))
