"""A process that is killed at any moment leaves a whole checkpoint: the last, or the new one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mcore_lab.checkpoint.folders import (
    LATEST,
    hidden,
    latest_checkpoint,
    step_folder,
    whole_checkpoints,
)
from mcore_lab.checkpoint.publication import (
    clean_up,
    make_room,
    prune,
    publish,
    wait_for_removals,
)
from mcore_lab.errors import CheckpointError

CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
MOST_CHANGES = 40


def write(folder: Path, content: str) -> Path:
    """Write what two shards and the mark of a whole checkpoint would be, the mark last."""
    folder.mkdir(parents=True)
    for name in ("__0_0.distcp", "__1_0.distcp", "metadata.json"):
        (folder / name).write_text(content)
    return folder


def content_of(folder: Path) -> set[str]:
    return {file.read_text() for file in folder.iterdir()}


def save(checkpoints: Path, step: int, content: str = "new") -> None:
    folder = step_folder(checkpoints, step)
    unfinished = hidden(folder, "unfinished")
    make_room(unfinished, 0)
    unfinished.rmdir()
    publish(write(unfinished, content), folder, step)


def killed_at(change: int, body: Callable[[], object]) -> bool:
    """Run the body in a process that is killed before its nth change; say whether it was."""
    pid = os.fork()
    if pid == 0:
        left = change

        def hook(event: str, _: object) -> None:
            nonlocal left
            if event in CHANGES:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            body()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("step", [2, 3], ids=["in its own place", "beside"])
def test_a_save_that_is_killed_at_any_moment_leaves_one_whole_checkpoint_to_go_on_from(
    tmp_path: Path, step: int
) -> None:
    kills = 0
    for change in range(1, MOST_CHANGES):
        checkpoints = tmp_path / str(change)
        save(checkpoints, 1, "old")
        save(checkpoints, 2, "old")
        if not killed_at(change, lambda folder=checkpoints: save(folder, step)):
            break
        kills += 1
        latest = latest_checkpoint(checkpoints)
        assert latest is not None and len(content_of(latest)) == 1
        clean_up(checkpoints)
        assert not list(checkpoints.glob(".*"))
        latest = latest_checkpoint(checkpoints)
        assert latest is not None and latest.name in ("step-00000002", f"step-0000000{step}")
        assert {len(content_of(f)) for f in whole_checkpoints(checkpoints).values()} == {1}
    assert 8 < kills < MOST_CHANGES - 1
    assert latest_checkpoint(checkpoints) == step_folder(checkpoints, step)
    assert content_of(step_folder(checkpoints, step)) == {"new"}


def test_a_removal_that_is_killed_at_any_moment_leaves_no_half_of_a_checkpoint(
    tmp_path: Path,
) -> None:
    for change in range(1, MOST_CHANGES):
        checkpoints = tmp_path / str(change)
        for step in (1, 2, 3):
            save(checkpoints, step, "old")
        ended = not killed_at(change, lambda folder=checkpoints: prune(folder, 1))
        clean_up(checkpoints)
        assert not list(checkpoints.glob(".*"))
        assert all(len(list(folder.iterdir())) == 3 for folder in checkpoints.glob("step-*"))
        assert latest_checkpoint(checkpoints) == step_folder(checkpoints, 3)
        if ended:
            break
    assert 8 < change < MOST_CHANGES - 1
    assert list(whole_checkpoints(checkpoints)) == [3]


def test_the_latest_is_the_one_that_was_published_last(tmp_path: Path) -> None:
    """A run that has gone on from step 2 is at step 4, whatever an earlier one left after it."""
    for step in (2, 4, 6, 4):
        save(tmp_path, step)
    assert (tmp_path / LATEST).read_text() == "4\n"
    assert latest_checkpoint(tmp_path) == step_folder(tmp_path, 4)


@pytest.mark.parametrize("mark", ["5\n", "", "step-2", "-1"])
def test_a_mark_that_means_nothing_gives_the_highest_step(tmp_path: Path, mark: str) -> None:
    for step in (2, 4):
        save(tmp_path, step)
    (tmp_path / LATEST).write_text(mark)
    assert latest_checkpoint(tmp_path) == step_folder(tmp_path, 4)


def test_those_that_go_first_are_left_behind_then_the_oldest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    gone = prune(tmp_path, 3, latest=4)
    assert [folder.name for folder in gone] == ["step-00000005", "step-00000001"]
    assert list(whole_checkpoints(tmp_path)) == [2, 3, 4]
    assert prune(tmp_path, 3) == []


def test_those_that_go_in_the_background_are_no_checkpoints_at_once_and_gone_in_the_end(
    tmp_path: Path,
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    prune(tmp_path, 1, in_background=True)
    assert list(whole_checkpoints(tmp_path)) == [3]
    wait_for_removals()
    assert not list(tmp_path.glob(".step-*"))


def test_a_checkpoint_that_cannot_be_removed_is_one_clear_error(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / ".step-00000001.removed").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot remove the checkpoint .*step-00000001: "):
        prune(tmp_path, 1)
    assert list(whole_checkpoints(tmp_path)) == [1, 2]
