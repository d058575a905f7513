"""`--track`: TensorBoard and a tracker of one's own are told what `metrics.jsonl` holds."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, changed

from mcore_lab.checkpoint import step_folder
from mcore_lab.config import Recipe, RunArguments
from mcore_lab.errors import BackendError, ConfigError
from mcore_lab.recipes.start import require_startable, run_rank
from mcore_lab.runtime import choose_device, launch
from mcore_lab.training import RunFolder
from mcore_lab.training.track import find_tracker, numbers

REPOSITORY = Path(__file__).parent.parent.parent
TP2 = changed(SMALL, layout={"tensor_model_parallel_size": 2})


def tracked(recipe: Recipe, folder: Path, track: str, nproc: int = 2, **how: Any) -> RunFolder:
    arguments = RunArguments(recipe=recipe, run_dir=folder, json=True, track=track, **how)
    require_startable(arguments, nproc)
    launch(run_rank, nproc, arguments, timeout=120, device=choose_device(nproc).type)
    return RunFolder(folder)


# TensorBoard.


def curves(folder: RunFolder) -> dict[str, dict[int, float]]:
    """Return what TensorBoard itself shows of a run: the value of each curve, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder.path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_goes_on_in_the_same_curves_which_are_those_of_metrics_jsonl(
    tmp_path: Path,
) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    folder = tracked(changed(TP2, checkpoint={"save_every": 2}), tmp_path, "tensorboard")
    abandoned = [line["loss"] for line in folder.metrics()]
    # Again from step 2, on a course of its own.
    from_2 = {"resume": str(step_folder(folder.checkpoints, 2)), "steps": 5, "lr": 1e-3}
    tracked(changed(TP2, training=from_2), tmp_path, "tensorboard")
    lines, shown = folder.metrics(), curves(folder)
    assert lines[3]["loss"] != abandoned[3]
    for group, name in [
        ("optimizer", "grad_norm"),
        ("optimizer", "lr"),
        ("resources", "tokens_per_second"),
        ("resources", "tflops_per_rank"),
        ("resources", "peak_memory_bytes"),
    ]:
        expected = {line["step"]: pytest.approx(line[name], rel=1e-6) for line in lines}
        assert shown[f"{group}/{name}"] == expected
        assert list(shown[f"{group}/{name}"]) == [1, 2, 3, 4, 5]
    assert list(shown["loss/training"].values()) == pytest.approx([line["loss"] for line in lines])
    forward = [line["seconds_by_phase"]["forward"] for line in lines]
    assert list(shown["seconds/of_step/forward"].values()) == pytest.approx(forward)
    # The run stood still after the steps that a checkpoint was written after.
    assert list(shown["seconds/checkpoint"]) == [2, 5]
    # Not of a model without experts on a CPU.
    assert not {"resources/mfu", "mixture_of_experts/imbalance"} & {*shown}
    # A file for each time that the run began: the second of two ranks writes none.
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    # Anew, the run has no curves but its own.
    tracked(changed(TP2, training={"steps": 1}), tmp_path, "tensorboard", fresh=True)
    assert list(curves(folder)["loss/training"]) == [1]


def test_without_tensorboard_the_command_says_how_to_install_it(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorboard"):
        (tmp_path / "hidden.py").write_text(
            "import importlib.util as u\n"
            "find = u.find_spec\n"
            "u.find_spec = lambda name, *a: None if name == 'tensorboard' else find(name, *a)\n"
            "from mcore_lab.cli import main\n"
            "raise SystemExit(main())\n"
        )
        program = [str(tmp_path / "hidden.py")]
    else:
        program = ["-m", "mcore_lab"]
    words = ["run", "tp2_gpt", "--nproc", "2", "--track", "tensorboard"]
    done = command(*program, *words, folder=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "error: --track tensorboard needs TensorBoard: pip install 'mcore-lab[track]'\n",
    )
    assert not (tmp_path / "runs").exists()


# One's own.


class Own:
    """Writes what it is told into the run folder."""

    def start(self, recipe: Recipe, folder: Path, first_step: int) -> None:
        self.file = (folder / f"own-{os.environ['RANK']}").open("a")
        self.say("start", recipe.name, first_step)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.say("step", step, dict(metrics))

    def end(self) -> None:
        self.say("end")
        self.file.close()

    def say(self, *words: Any) -> None:
        self.file.write(json.dumps(words) + "\n")
        self.file.flush()


class FailsInStep(Own):
    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        super().step(step, metrics)
        if step == 2:
            raise OSError("nobody\nanswers")


class FailsInStart(Own):
    def start(self, *_: Any) -> None:
        raise TimeoutError("nobody answers")


class NoTracker:
    def start(self, *_: Any) -> None: ...


def heard(folder: RunFolder, rank: int = 0) -> list[list[Any]]:
    lines = (folder.path / f"own-{rank}").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_tracker_of_ones_own_is_told_of_every_step_on_rank_0_alone(tmp_path: Path) -> None:
    folder = tracked(changed(TP2, checkpoint={"save": False}), tmp_path, f"{__name__}:Own")
    first, *steps, last = heard(folder)
    assert first == ["start", "tp2_gpt", 0] and last == ["end"]
    assert steps == [["step", line["step"], numbers(line)] for line in folder.metrics()]
    assert not (tmp_path / "own-1").exists()


def test_a_run_goes_on_without_a_tracker_that_fails(tmp_path: Path) -> None:
    recipe = changed(SMALL, checkpoint={"save": False})
    folder = tracked(recipe, tmp_path, f"{__name__}:FailsInStep", nproc=1)
    assert [line["step"] for line in folder.metrics()] == [1, 2, 3, 4]
    assert [words[0] for words in heard(folder)] == ["start", "step", "step"]
    log = (folder.logs / "rank-0.log").read_text()
    assert "failed at step 2: OSError: nobody answers; the run goes on without it" in log


def test_a_tracker_that_cannot_start_ends_the_run_on_all_ranks_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cannot start: TimeoutError: nobody answers"):
        tracked(TP2, tmp_path, f"{__name__}:FailsInStart")
    assert RunFolder(tmp_path).metrics() == []


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("tensorbord", "it is tensorboard, or module:Class"),
        (":Own", "it is tensorboard, or module:Class"),
        ("no_such_module:Own", "importing no_such_module failed: ModuleNotFoundError: No module"),
        (f"{__name__}:Nothing", f"there is no Nothing in {__name__}"),
        (f"{__name__}:NoTracker", "NoTracker is no class with the methods start, step, end; it"),
        (f"{__name__}:tracked", "lacks start, step, end"),
    ],
)
def test_a_name_that_is_no_trackers_is_told_in_a_line(name: str, what: str) -> None:
    with pytest.raises(ConfigError) as told:
        find_tracker(name)
    assert what in str(told.value) and "\n" not in str(told.value)


def test_the_command_finds_a_tracker_in_the_working_directory_and_refuses_what_takes_no_step(
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.py").write_text("raise RuntimeError('found')\n")
    for recipe, what in [
        ("tp2_gpt", "--track mine:Own: importing mine failed: RuntimeError: found"),
        ("tp_mlp", "tp_mlp shows a layer: there is no step to --track"),
    ]:
        # As the installed command does, not `python -m`, which finds the directory by itself.
        program = ["-P", "-c", "from mcore_lab.cli import main; raise SystemExit(main())"]
        done = command(*program, "run", recipe, "--track", "mine:Own", folder=tmp_path)
        assert (done.returncode, done.stderr) == (2, f"error: {what}\n")


def test_what_is_not_there_is_no_number() -> None:
    assert numbers({"step": 3, "loss": 1, "mtp_loss": None}) == {"loss": 1.0}


def command(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
