"""Recipes as a person runs them: the command line, torchrun, and what goes wrong on the way."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mcore_lab import recipes
from mcore_lab.recipes import recipe_names

REPOSITORY = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
SMALL = [
    *["--model.num-layers", "2", "--model.hidden-size", "32", "--data.sequence-length", "16"],
    *["--data.micro-batch-size", "2", "--data.global-batch-size", "4"],
]
LAB = [sys.executable, "-m", "mcore_lab"]
RUN = [*LAB, "run", "tp2_gpt", "--nproc", "2", *SMALL]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TEXT = "".join(f"{number} bottles of beer on the wall\n" for number in range(2000))


def finish(
    words: list[str], folder: Path, *, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of three steps, and how its command ended."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, finish([*RUN, "--training.steps", "3", "--json"], folder)


@pytest.fixture
def folder(finished: tuple[Path, Any], tmp_path: Path) -> Path:
    """A folder of the test's own, in which that run is."""
    shutil.copytree(finished[0] / "runs", tmp_path / "runs")
    return tmp_path


# What a run leaves.


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_a_short_module(name: str) -> None:
    lines = (Path(recipes.__path__[0]) / f"{name}.py").read_text().splitlines()
    assert 20 <= len(lines) <= 60


def test_json_is_one_object_on_standard_output_and_nothing_else(finished: Any) -> None:
    folder, done = finished
    assert done.returncode == 0 and done.stderr == ""
    answer = json.loads(done.stdout)
    assert answer == {
        "run_dir": "runs/tp2_gpt",
        "steps": 3,
        "loss": losses(folder / "runs" / "tp2_gpt")[-1],
        "valid_loss": None,
        "checkpoint": "runs/tp2_gpt/checkpoints/step-00000003",
    }


def test_a_run_leaves_a_folder_that_says_what_ran_and_what_came_of_it(finished: Any) -> None:
    folder = finished[0] / "runs" / "tp2_gpt"
    assert sorted(path.name for path in folder.iterdir()) == [
        ".launch",
        "checkpoints",
        "logs",
        "metrics.jsonl",
        "recipe.toml",
    ]
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]


def test_the_recipe_that_a_run_wrote_runs_it_again(folder: Path) -> None:
    words = [*LAB, "run", "runs/tp2_gpt/recipe.toml", "--nproc", "2", "--run-dir", "again"]
    assert finish(words, folder).returncode == 0
    assert losses(folder / "again") == pytest.approx(losses(folder / "runs/tp2_gpt"), rel=1e-6)
    written = (folder / "again" / "recipe.toml").read_text()
    assert written == (folder / "runs" / "tp2_gpt" / "recipe.toml").read_text()


def test_fresh_starts_anew_and_tells_of_each_step_in_a_line(folder: Path) -> None:
    done = finish([*RUN, "--training.steps", "2", "--fresh"], folder)
    assert done.returncode == 0 and done.stderr == ""
    said = done.stdout.splitlines()
    assert said[0] == "tp2_gpt: 2 ranks, run folder runs/tp2_gpt"
    assert said[1].startswith("device cpu with gloo: ")
    assert said[2].startswith("backend torch: ")
    assert [line.partition("  ")[0] for line in said[3:5]] == ["step 1/2", "step 2/2"]
    assert said[5:] == ["checkpoint runs/tp2_gpt/checkpoints/step-00000002"]
    checkpoints = folder / "runs" / "tp2_gpt" / "checkpoints"
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["latest_checkpointed_iteration.txt", "step-00000002"]
    assert [line["step"] for line in metrics(folder / "runs" / "tp2_gpt")] == [1, 2]


def test_a_run_goes_on_by_itself_or_from_a_path_under_torchrun(folder: Path) -> None:
    before = losses(folder / "runs" / "tp2_gpt")
    steps = ["--training.steps", "5"]
    done = finish([*RUN, *steps, "--training.resume", "auto"], folder)
    assert done.returncode == 0
    whole = losses(folder / "runs" / "tp2_gpt")
    assert len(whole) == 5 and whole[:3] == before

    path = "runs/tp2_gpt/checkpoints/step-00000003"
    module = [*TORCHRUN, "-m", "mcore_lab.recipes.tp2_gpt", *SMALL, *steps, "--json"]
    done = finish([*module, "--training.resume", path, "--run-dir", "other"], folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 5
    assert losses(folder / "other") == pytest.approx(whole[3:], rel=1e-6)


def test_a_module_alone_is_a_run_of_one_rank(finished: Any, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mcore_lab.recipes.tp2_gpt", *SMALL, "--layout.tp", "1"]
    done = finish([*words, "--training.steps", "3"], tmp_path)
    assert done.returncode == 0, done.stderr
    two = losses(finished[0] / "runs" / "tp2_gpt")
    assert losses(tmp_path / "runs" / "tp2_gpt") == pytest.approx(two, rel=1e-5)


# What can be seen to be wrong before anything starts.


def damaged(folder: Path) -> str:
    path = folder / "runs" / "tp2_gpt" / "checkpoints" / "step-00000003"
    (path / "metadata.json").write_text("garbage")
    return str(path)


WRONG = {
    "an existing run": (RUN, "there is a run in runs/tp2_gpt already: --fresh to start it anew"),
    "a missing text": (
        [*LAB, "run", "text_gpt", "--data.path", "nothing.txt"],
        "there is no file or folder of text at nothing.txt",
    ),
    "no text here": ([*LAB, "run", "text_gpt", "--run-dir", "new"], "there is no text file in /"),
    "a missing checkpoint": (
        [*RUN, "--fresh", "--checkpoint.load", "nothing"],
        "there is no checkpoint at nothing: no such folder",
    ),
    "a folder that is not a run's": (
        [*RUN, "--run-dir", "runs"],
        "runs holds files that are not of a run",
    ),
    "no such number of steps": (
        [*RUN, "--fresh", "--training.steps", "-1"],
        "--training.steps must not be below 0; it is -1",
    ),
}


def require_one_line(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=list(WRONG))
def test_what_is_wrong_is_told_in_a_line_and_nothing_is_touched(
    folder: Path, words: list[str], message: str
) -> None:
    before = contents(folder)
    require_one_line(finish(words, folder), message)
    assert contents(folder) == before


def test_a_damaged_checkpoint_is_told_in_a_line(folder: Path) -> None:
    path = damaged(folder)
    before = contents(folder)
    words = [*RUN, "--run-dir", "new", "--checkpoint.load", path]
    require_one_line(finish(words, folder), f"cannot read the checkpoint {path}: metadata.json is")
    assert contents(folder) == before


def test_torchrun_tells_it_once(tmp_path: Path) -> None:
    words = [*TORCHRUN, "-m", "mcore_lab.recipes.text_gpt", "--data.path", "nothing.txt"]
    done = finish(words, tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: there is no file or folder of text at nothing.txt") == 1
    assert list(tmp_path.iterdir()) == []


LATE = """
import os, time
from mcore_lab.config import exit_with
from mcore_lab.errors import ConfigError
if os.environ["RANK"] == "0":
    time.sleep(3)
exit_with(ConfigError("all ranks found this, and rank 0 last"))
"""


def test_torchrun_tells_it_also_when_another_rank_finds_it_first(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    done = finish([*TORCHRUN, "late.py"], tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: all ranks found this, and rank 0 last") == 1


# What only the ranks can see to be wrong.


RANKS_SEE = {
    "a checkpoint of another model": (
        [*RUN, "--model.hidden-size", "64", "--checkpoint.load", "runs/tp2_gpt"],
        "the checkpoint runs/tp2_gpt/checkpoints/step-00000003 is of another model: ",
    ),
    "a model that Megatron-Core refuses": (
        [
            *[*RUN, "--model.transformer.bias-activation-fusion", "True"],
            *["--model.transformer.activation-func", "relu"],
        ],
        "Megatron-Core refuses the model: ",
    ),
    "fewer rows than tokens": (
        [*LAB, "run", "text_gpt", "--data.path", "beer.txt", "--model.vocab-size", "128"],
        "the data's tokens need an embedding of 256 rows, but the model has 128: ",
    ),
}


@pytest.mark.parametrize(("words", "message"), RANKS_SEE.values(), ids=list(RANKS_SEE))
def test_what_the_ranks_see_to_be_wrong_is_told_in_a_line_too(
    folder: Path, words: list[str], message: str
) -> None:
    (folder / "beer.txt").write_text(TEXT)
    require_one_line(finish([*words, "--run-dir", "new"], folder), message)
    assert not (folder / "new").exists()


# What ends a run in the middle.


@contextlib.contextmanager
def running(folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """Start a run without end, wait for its first step, and give its process and its ranks."""
    process = subprocess.Popen(
        [*RUN, "--training.steps", "1000000"],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests that run in a shell's background inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    family: list[psutil.Process] = []
    try:
        assert process.stdout
        assert any(line.startswith("step") for line in process.stdout)
        family = psutil.Process(process.pid).children(recursive=True)
        yield process, [child for child in family if len(child.children()) == 0]
    finally:
        for one in [process, *family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.communicate(timeout=60)


def end_of(process: subprocess.Popen[str], ranks: list[psutil.Process]) -> tuple[int, str]:
    """Return exit status and what was said on standard error; no rank may be left."""
    _, said = process.communicate(timeout=60)
    assert psutil.wait_procs(ranks, timeout=5)[1] == []
    return process.returncode, said


def test_a_rank_that_is_killed_ends_the_run_within_ten_seconds_and_is_named(tmp_path: Path) -> None:
    with running(tmp_path) as (process, ranks):
        assert len(ranks) == 2
        for rank in ranks:
            assert rank.is_running()
        started = time.monotonic()
        ranks[1].send_signal(signal.SIGKILL)
        status, said = end_of(process, ranks)
        assert time.monotonic() - started < 10
    assert status == 1
    assert f"was killed by SIGKILL (process {ranks[1].pid})" in said
    assert said.startswith("error: rank ") and said.count("\n") == 1


def test_ctrl_c_leaves_no_rank_and_no_traceback(tmp_path: Path) -> None:
    with running(tmp_path) as (process, ranks):
        # A terminal sends it to all of them.
        os.killpg(process.pid, signal.SIGINT)
        assert end_of(process, ranks) == (130, "error: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_to_end_saves_after_the_step_and_says_how_to_go_on(
    tmp_path: Path, number: int
) -> None:
    with running(tmp_path) as (process, ranks):
        process.send_signal(number)
        status, said = end_of(process, ranks)
    assert status == 75
    (checkpoint,) = (tmp_path / "runs" / "tp2_gpt" / "checkpoints").glob("step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    assert said == (
        f"error: a signal stopped the run after step {step}, with the checkpoint "
        f"{checkpoint.relative_to(tmp_path)}: --training.resume auto goes on from it\n"
    )
