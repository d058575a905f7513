"""`-m mcore_lab.cpu SCRIPT`: scripts that are written for CUDA and NCCL run as they are."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from megatron_lm import megatron_lm, python_path

SCRIPTS = Path(__file__).parent / "scripts"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def _python(
    *arguments: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | environment,
    )


def test_a_plain_cuda_script_trains_saves_and_loads_on_two_ranks(tmp_path: Path) -> None:
    script = SCRIPTS / "plain_cuda_training.py"
    done = _python(*TORCHRUN, "-m", "mcore_lab.cpu", script, tmp_path / "checkpoint")
    assert done.returncode == 0, done.stderr
    said = re.findall(r"rank (\d) losses (\[[^\]]*\])", done.stdout)
    losses = {rank: json.loads(text) for rank, text in said}
    assert losses.keys() == {"0", "1"}
    assert losses["0"] == losses["1"]
    assert losses["0"][-1] < 0.8 * losses["0"][0]
    assert (tmp_path / "checkpoint" / "metadata.json").is_file()


def test_a_script_that_fails_says_so_and_exits_non_zero() -> None:
    one_rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = _python("-m", "mcore_lab.cpu", SCRIPTS / "failing.py", **one_rank)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ValueError: the script fails")


def test_a_script_sees_its_own_arguments_and_folder(tmp_path: Path) -> None:
    script = SCRIPTS / "whoami.py"
    done = _python("-m", "mcore_lab.cpu", script, "--steps", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "argv": [str(script), "--steps", "3"],
        "name": "__main__",
        "path": str(SCRIPTS),
        "device": "cpu",
    }


def test_a_module_is_run_with_its_arguments() -> None:
    done = _python("-m", "mcore_lab.cpu", "-m", "whoami", "-x", cwd=SCRIPTS)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["argv"] == [str(SCRIPTS / "whoami.py"), "-x"]
    assert said["name"] == "__main__"
    assert said["device"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: torchrun"),
        (["-m"], "-m needs the name of a module"),
        (["-m", "no_such_module.main"], "no module named no_such_module.main"),
        (["no_such_script.py"], "no script at no_such_script.py"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(arguments: list[str], message: str) -> None:
    done = _python("-m", "mcore_lab.cpu", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_no_error() -> None:
    done = _python("-m", "mcore_lab.cpu", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: torchrun")


def test_megatron_lms_own_training_loop_runs_unmodified(tmp_path: Path) -> None:
    checkout = megatron_lm()
    (tmp_path / "ckpt").mkdir()
    done = _python(
        *TORCHRUN,
        "-m",
        "mcore_lab.cpu",
        checkout / "examples" / "run_simple_mcore_train_loop.py",
        cwd=tmp_path,
        PYTHONPATH=python_path(checkout),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Successfully loaded the model") == 2
    # Random tokens out of 100, and a loss that both ranks report alike at each of five steps.
    losses = set(re.findall(r"Iteration (\d): [^(]*tensor\(([\d.]+)", done.stdout))
    assert sorted(step for step, _ in losses) == ["0", "1", "2", "3", "4"]
    assert all(abs(float(loss) - math.log(100)) < 0.1 for _, loss in losses)
