"""`recipes/slurm/train.sbatch`, submitted to a Slurm of two nodes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm import Slurm, slurm
from test_many_machines import SMALL, losses, one_node

from mcore_lab.training import RunFolder

REPOSITORY = Path(__file__).parents[1]
SCRIPT = str(REPOSITORY / "recipes" / "slurm" / "train.sbatch")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Slurm]:
    with slurm(2, folder) as started:
        yield started


def submit(
    cluster: Slurm,
    name: str,
    *words: str,
    recipe: str = "tp2_gpt",
    ranks: int = 1,
    limit: str = "1:00:00",
) -> str:
    """Submit a small run on both nodes, of so many ranks each, into the folder `name`."""
    own = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "RUN_DIR": name,
        "RANKS_PER_NODE": str(ranks),
    }
    return cluster.submit("--time", limit, SCRIPT, recipe, *SMALL, *words, **own)


def start_soon(cluster: Slurm, job: str) -> None:
    """Start a job that is queued again, in the place of after two minutes.

    Not in the second of its end: Slurm takes its new credential for the old one, and it fails.
    """
    cluster.wait(job, lambda job: job["JobState"] == "PENDING", 30)
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+5")


def has_ended(job: dict[str, str]) -> bool:
    return job["JobState"] in ENDED


def step_of(run: Path) -> int:
    """Return the last step that a run has taken so far."""
    return sum(1 for _ in (run / "metrics.jsonl").open()) if (run / "metrics.jsonl").exists() else 0


def wait_for(cluster: Slurm, job: str, what: Callable[[], bool]) -> None:
    """Wait for what a job does while it runs."""
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end and not has_ended(cluster.job(job)), cluster.log(job)
        time.sleep(0.2)


@pytest.mark.slow
def test_a_job_of_two_nodes_has_the_losses_of_one_node(cluster: Slurm, folder: Path) -> None:
    job = submit(cluster, "whole", "--training.steps", "3")
    cluster.wait(job, has_ended, 120)
    assert cluster.job(job)["JobState"] == "COMPLETED", cluster.log(job)
    expected = one_node("tp2_gpt", 2, [*SMALL, "--training.steps", "3"], folder)
    assert losses(folder / "whole") == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_job_that_is_signalled_saves_is_queued_again_and_ends_as_one_that_was_not(
    cluster: Slurm, folder: Path
) -> None:
    words = ["--training.steps", "600", "--checkpoint.save-every", "1000"]
    job = submit(cluster, "stopped", *words)
    wait_for(cluster, job, lambda: step_of(folder / "stopped") >= 50)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(job, lambda job: job["Restarts"] == "1", 60)
    said = cluster.log(job)
    assert "a signal stopped the run after step" in said and "queued again" in said
    assert 50 <= step_of(folder / "stopped") < 600
    start_soon(cluster, job)
    cluster.wait(job, has_ended, 180)
    assert cluster.job(job)["JobState"] == "COMPLETED", cluster.log(job)
    metrics = RunFolder(folder / "stopped").metrics()
    assert [line["step"] for line in metrics] == list(range(1, 601))
    whole = folder / "not_stopped"
    whole.mkdir()
    expected = one_node("tp2_gpt", 2, [*SMALL, *words], whole)
    assert losses(folder / "stopped")[-1] == pytest.approx(expected[-1], abs=1e-5)


ENDLESS = ["--training.steps", "1000000", "--checkpoint.save-every", "1000000"]


@pytest.mark.slow
def test_a_job_whose_time_is_up_has_saved_two_minutes_before_and_is_queued_again(
    cluster: Slurm, folder: Path
) -> None:
    job = submit(cluster, "timed", *ENDLESS, limit="3")
    cluster.wait(job, lambda job: job["Restarts"] == "1", 170)
    cluster.run("scancel", job)
    assert "a signal stopped the run after step" in cluster.log(job)
    steps = step_of(folder / "timed")
    assert (folder / "timed" / "checkpoints" / f"step-{steps:08}").is_dir()


@pytest.mark.slow
def test_a_job_that_another_preempts_saves_makes_room_and_goes_on_after_it(
    cluster: Slurm, folder: Path
) -> None:
    """Slurm sends SIGTERM, and a minute later would kill."""
    words = [*ENDLESS, "--checkpoint.async"]
    job = submit(cluster, "preempted", *words, recipe="tp2_pp2_gpt", ranks=2)
    wait_for(cluster, job, lambda: step_of(folder / "preempted") >= 5)
    urgent = cluster.submit("--partition", "urgent", "--nodes", "2", "--wrap", "true")
    cluster.wait(urgent, has_ended, 90)
    assert cluster.job(urgent)["JobState"] == "COMPLETED"
    assert cluster.job(job)["Restarts"] == "1", cluster.log(job)
    steps = step_of(folder / "preempted")
    assert (folder / "preempted" / "checkpoints" / f"step-{steps:08}").is_dir()
    start_soon(cluster, job)
    wait_for(cluster, job, lambda: step_of(folder / "preempted") > steps)
    cluster.run("scancel", job)
    cluster.wait_until_idle(60)
    taken = [line["step"] for line in RunFolder(folder / "preempted").metrics()]
    assert taken == list(range(1, len(taken) + 1))


@pytest.mark.slow
def test_a_job_that_is_cancelled_saves_and_is_not_queued_again(
    cluster: Slurm, folder: Path
) -> None:
    job = submit(cluster, "cancelled", *ENDLESS)
    wait_for(cluster, job, lambda: step_of(folder / "cancelled") >= 5)
    cluster.run("scancel", job)
    cluster.wait(job, has_ended, 60)
    cluster.wait_until_idle(60)
    steps = step_of(folder / "cancelled")
    assert (folder / "cancelled" / "checkpoints" / f"step-{steps:08}").is_dir()
    shown = cluster.job(job)
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "0")


@pytest.mark.slow
def test_a_job_that_cannot_start_fails_and_is_not_queued_again(cluster: Slurm) -> None:
    job = submit(cluster, "misspelt", "--training.stepz", "3")
    cluster.wait(job, has_ended, 120)
    shown = cluster.job(job)
    assert (shown["JobState"], shown["Restarts"]) == ("FAILED", "0")
    said = cluster.log(job)
    assert "unknown option --training.stepz" in said
    assert "without a checkpoint since it began" in said
