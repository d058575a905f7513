"""`pytest -p mcore_lab.cpu.pytest_plugin`: test files that are written for CUDA and NCCL."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron_lm import megatron_lm, python_path

TEST_FILE = Path(__file__).parent / "scripts" / "tests_for_cuda.py"
PLUGIN = ("-p", "mcore_lab.cpu.pytest_plugin")


def _pytest(
    nproc: int, *arguments: object, cwd: Path | None = None, timeout: float = 180, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run pytest on `nproc` ranks under torchrun, without this project's own settings."""
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", nproc)
    plain = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=")
    return subprocess.run(
        [sys.executable, "-m", *map(str, (*torchrun, *plain, *arguments))],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | env,
    )


def test_a_cuda_test_file_passes_on_every_rank(tmp_path: Path) -> None:
    done = _pytest(2, *PLUGIN, TEST_FILE, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("1 passed") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="the file passes without the layer on CUDA")
def test_without_the_plugin_it_does_not(tmp_path: Path) -> None:
    done = _pytest(2, TEST_FILE, cwd=tmp_path)
    assert done.returncode == 1
    assert "passed" not in done.stdout
    assert "1 error" in done.stdout


@pytest.mark.slow
def test_megatron_lms_own_tests_pass_on_two_ranks() -> None:
    checkout = megatron_lm()
    unit_tests = checkout / "tests" / "unit_tests"
    files = [
        unit_tests / "tensor_parallel" / "test_random.py",
        unit_tests / "transformer" / "moe" / "test_sequential_mlp.py",
        unit_tests / "distributed" / "test_param_and_grad_buffer.py",
    ]
    # Eight ranks, Transformer Engine, a tensor on a GPU.
    beyond = "not model_parallel_cuda_manual_seed and not convert_cuda_rng and not gpu_forward"
    done = _pytest(
        2,
        *PLUGIN,
        "-k",
        beyond,
        *files,
        cwd=checkout,
        timeout=400,
        PYTHONPATH=python_path(checkout),
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = [int(count) for count in re.findall(r"^(\d+) passed", done.stdout, re.MULTILINE)]
    assert len(passed) == 2
    assert min(passed) > 60
