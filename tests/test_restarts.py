"""A rank that fails leads to a new start from the last checkpoint, and to the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, changed, losses, run

from mcore_lab.config import Recipe, RunArguments, recipe_to_toml
from mcore_lab.errors import RankFailedError
from mcore_lab.recipes.start import launch_recipe, restarted
from mcore_lab.training import RunFolder, recorder

RECIPE = changed(
    SMALL,
    training={"steps": 6},
    checkpoint={"save_every": 2},
    layout={"tensor_model_parallel_size": 2},
)
Recorder = recorder.Recorder


class KilledInStep5(Recorder):
    """Its rank 1 is killed in its fifth step, as often as there are files to remove."""

    bombs = Path()

    def look_at_gradients(self, step: int, *seen: Any) -> None:
        """Kill the process."""
        left = sorted(self.bombs.glob("bomb-*"))
        if step == 5 and os.environ["RANK"] == "1" and left:
            left[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)


def run_killed(
    monkeypatch: pytest.MonkeyPatch, folder: Path, times: int, **arguments: Any
) -> dict[str, Any]:
    for number in range(times):
        (folder / f"bomb-{number}").touch()
    monkeypatch.setattr(KilledInStep5, "bombs", folder)
    monkeypatch.setattr(recorder, "Recorder", KilledInStep5)
    asked = RunArguments(recipe=RECIPE, run_dir=folder / "run", json=True, **arguments)
    return launch_recipe(asked, 2, max_restarts=2)


def test_a_run_whose_rank_is_killed_twice_ends_as_one_that_was_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run_killed(monkeypatch, tmp_path, 2)
    monkeypatch.undo()
    metrics = RunFolder(tmp_path / "run").metrics()
    assert summary["steps"] == 6 and [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert losses(metrics) == losses(run(RECIPE, 2, tmp_path / "whole"))
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in told] == [
        f"restart {number} of 2, from {tmp_path}/run/checkpoints/step-00000004" for number in (1, 2)
    ]


def test_a_third_failure_of_two_is_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match="rank 1 was killed by SIGKILL"):
        run_killed(monkeypatch, tmp_path, 3)


# What a restart takes up.


def begun(folder: Path, recipe: Recipe, *, saved: bool) -> RunArguments:
    """Return the arguments of a launch that had begun a run, and saved or not, when it failed."""
    run_folder = RunFolder(folder)
    run_folder.begin(recipe_to_toml(recipe), fresh=False, launch="this launch")
    if saved:
        run_folder.checkpoints.mkdir()
        (run_folder.checkpoints / "latest_checkpointed_iteration.txt").write_text("2\n")
    return RunArguments(recipe=recipe, run_dir=folder, launch="this launch")


def test_a_launch_that_had_saved_goes_on_and_never_begins_anew(tmp_path: Path) -> None:
    asked = replace(begun(tmp_path / "run", RECIPE, saved=True), fresh=True)
    again = restarted(asked)
    assert (again.recipe.training.resume, again.fresh) == ("auto", False)


def test_a_launch_that_had_not_saved_begins_again_in_its_own_folder(tmp_path: Path) -> None:
    again = restarted(begun(tmp_path / "run", RECIPE, saved=False))
    assert (again.recipe.training.resume, again.fresh) == ("none", True)


@pytest.mark.parametrize("resume", ["auto", "elsewhere/step-00000007"])
def test_a_launch_that_had_not_saved_starts_again_from_where_it_was_told_to(
    tmp_path: Path, resume: str
) -> None:
    recipe = changed(RECIPE, training={"resume": resume})
    asked = begun(tmp_path / "run", recipe, saved=False)
    assert restarted(asked) == asked


def test_a_launch_that_had_begun_nothing_leaves_an_earlier_run_to_what_it_was_told(
    tmp_path: Path,
) -> None:
    begun(tmp_path / "run", RECIPE, saved=True)
    asked = RunArguments(recipe=RECIPE, run_dir=tmp_path / "run", fresh=True, launch="another")
    assert restarted(asked) == asked


def test_a_launch_whose_second_leg_had_not_saved_goes_on_from_the_first(tmp_path: Path) -> None:
    asked = begun(tmp_path / "run", RECIPE, saved=True)
    RunFolder(asked.run_dir).begin(recipe_to_toml(RECIPE), fresh=False, launch="this launch")
    assert restarted(asked).recipe.training.resume == "auto"


SCRIPT = """\
import os, signal
from mcore_lab import cpu
cpu.preload()
from mcore_lab.training import recorder

class KilledOnce(recorder.Recorder):
    def look_at_gradients(self, step, *seen):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if step == 5 and os.environ["RANK"] == "1" and first:
            os.kill(os.getpid(), signal.SIGKILL)

recorder.Recorder = KilledOnce
from mcore_lab.recipes import tp2_gpt
from mcore_lab.recipes.start import main
main(tp2_gpt.RECIPE)
"""


def test_torchrun_that_restarts_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    finished = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run"),
            *("--nproc-per-node", "2", "--max-restarts", "1", "script.py"),
            *("--training.steps", "6", "--checkpoint.save-every", "2"),
            *("--model.num-layers", "2", "--model.hidden-size", "64"),
        ],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr
    steps = [line.split()[1] for line in finished.stdout.splitlines() if line.startswith("step")]
    assert steps == ["1/6", "2/6", "3/6", "4/6", "5/6", "6/6"]
    metrics = RunFolder(tmp_path / "runs" / "tp2_gpt").metrics()
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
