"""`mcore_lab.launch`: a run from Python, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcore_lab import launch
from mcore_lab.errors import LabError
from mcore_lab.training import RunFolder

SMALL = ("--model.num-layers", "2", "--model.hidden-size", "64", "--training.steps", "2")


def test_a_run_returns_how_it_ended_and_leaves_its_folder(tmp_path: Path) -> None:
    summary = launch("tp2_gpt", *SMALL, "--run-dir", str(tmp_path / "run"), nproc=2)
    steps = RunFolder(tmp_path / "run").metrics()
    assert (summary["steps"], summary["loss"]) == (2, steps[-1]["loss"])
    assert Path(summary["checkpoint"]).is_dir()


def test_a_run_that_cannot_start_raises_what_the_command_says(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="global_batch_size must be a multiple") as raised:
        launch("tp2_gpt", "--data.global-batch-size", "3", "--run-dir", str(tmp_path), nproc=2)
    assert "Traceback" not in str(raised.value)
    assert not list(tmp_path.iterdir())
