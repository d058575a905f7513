"""The folder of a run: nothing is written over unasked, nothing that is not a run's is removed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mcore_lab.errors import RunFolderError
from mcore_lab.training import RunFolder
from mcore_lab.training.metrics import StepMetrics


def metrics(step: int) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=step / 10,
        grad_norm=1.0,
        lr=0.1,
        step_seconds=1.0,
        tokens_per_second=1.0,
        peak_memory_bytes=1,
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of three steps, with a checkpoint and logs."""
    folder = RunFolder(tmp_path / "run")
    folder.begin('name = "x"\n', fresh=False)
    for step in (1, 2, 3):
        folder.record(metrics(step))
        folder.record_validation(step, 0.5)
    (folder.checkpoints / "step-00000003").mkdir(parents=True)
    (folder.checkpoints / "step-00000003" / "metadata.json").write_text("{}")
    (folder.checkpoints / ".step-00000004.unfinished").mkdir()
    folder.logs.mkdir()
    (folder.logs / "rank-0.log").write_text("log\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Which folders can be used.


@pytest.mark.parametrize("fresh", [True, False])
def test_a_folder_that_is_new_or_empty_can_be_used(tmp_path: Path, fresh: bool) -> None:
    RunFolder(tmp_path / "new").require_usable(fresh=fresh)
    RunFolder(tmp_path).require_usable(fresh=fresh)
    assert not (tmp_path / "new").exists()


def test_an_existing_run_is_refused_with_the_three_ways_on(run: RunFolder) -> None:
    with pytest.raises(RunFolderError) as raised:
        run.require_usable(fresh=False)
    message = str(raised.value)
    assert message.startswith(f"there is a run in {run.path} already")
    assert all(way in message for way in ("--fresh", "--training.resume auto", "--run-dir"))


def test_it_can_be_started_anew_or_gone_on_with(run: RunFolder) -> None:
    own = run.checkpoints / "step-00000003"
    run.require_usable(fresh=True)
    run.require_usable(fresh=False, resume="auto")
    run.require_usable(fresh=False, resume=str(own), start=own)


def test_going_on_from_another_runs_checkpoint_does_not_write_over_this_one(
    run: RunFolder, tmp_path: Path
) -> None:
    other = tmp_path / "other" / "checkpoints" / "step-00000001"
    with pytest.raises(RunFolderError, match="there is a run in"):
        run.require_usable(fresh=False, resume=str(other), start=other)
    run.require_usable(fresh=True, resume=str(other), start=other)


@pytest.mark.parametrize("resume", ["auto", "none", "path"])
def test_fresh_does_not_remove_the_checkpoint_that_the_run_starts_from(
    run: RunFolder, resume: str
) -> None:
    own = run.checkpoints / "step-00000003"
    with pytest.raises(RunFolderError, match=r"--fresh removes the run in .*, which this one is"):
        run.require_usable(fresh=True, resume=resume, start=own)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("name", ["notes.txt", "recipe.toml", "metrics.jsonl", ".git"])
def test_a_folder_with_files_that_are_not_of_a_run_is_refused(
    tmp_path: Path, name: str, fresh: bool
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunFolderError, match="holds files that are not of a run"):
        RunFolder(tmp_path).require_usable(fresh=fresh)
    assert contents(tmp_path) == {name: b"mine"}


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunFolderError, match="is not a folder"):
        RunFolder(tmp_path / "run").require_usable(fresh=True)


# Beginning.


def test_fresh_removes_the_run_and_nothing_else(run: RunFolder) -> None:
    mine = ("notes.txt", "checkpoints/best/weights", "logs/mine.log", "figures/loss.png")
    for name in mine:
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text("mine")
    run.begin('name = "y"\n', fresh=True)
    assert contents(run.path) == dict.fromkeys(mine, b"mine") | {
        "recipe.toml": b'name = "y"\n',
        "metrics.jsonl": b"",
        ".launch": b"",
    }
    assert not list(run.checkpoints.glob("step-*")) + list(run.checkpoints.glob(".step-*"))


def test_fresh_in_a_folder_that_holds_no_run_removes_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    RunFolder(tmp_path).begin("", fresh=True)
    assert (tmp_path / "checkpoints" / "step-1").exists()


def test_a_run_that_goes_on_forgets_the_steps_it_takes_again(run: RunFolder) -> None:
    run.begin('name = "x"\n', fresh=False, first_step=2)
    run.record(metrics(3))
    assert [line["step"] for line in run.metrics()] == [1, 2, 3]
    validation = (run.path / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in validation] == [1, 2]
    assert (run.checkpoints / "step-00000003").exists()


def test_a_last_line_that_was_cut_off_does_not_stop_a_run_from_going_on(run: RunFolder) -> None:
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    run.begin('name = "x"\n', fresh=False, first_step=3)
    run.record(metrics(4))
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4]


# What cannot be written.


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: folder.begin("", fresh=False),
        lambda folder: folder.record(metrics(1)),
        lambda folder: folder.record_validation(1, 0.5),
    ],
)
def test_what_cannot_be_written_is_an_error_with_the_folder_and_the_reason(
    tmp_path: Path, write: Callable[[RunFolder], None]
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFolderError, match=r"cannot write the run folder .*/file/run: Not a dir"):
        write(RunFolder(tmp_path / "file" / "run"))
