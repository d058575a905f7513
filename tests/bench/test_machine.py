"""What a benchmark says of the machine is true, and every benchmark says it."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from mcore_lab.bench.machine import this_machine, usable_cores, usable_memory
from mcore_lab.cli.bench import BENCHMARKS
from mcore_lab.cli.bench.found import Found
from mcore_lab.runtime.device import threads_per_rank

SMALL = [
    *("--model.num-layers", "2", "--model.hidden-size", "32"),
    *("--data.mock-document-length", "64", "--training.steps", "5"),
]
SMALLEST = {
    "launch": ["--nproc", "2", "--rounds", "1"],
    "step": ["tp2_gpt", *SMALL],
    "trace": ["tp2_gpt", *SMALL],
    "checkpoint": ["tp2_gpt", *SMALL],
    "soak": ["tp2_gpt", *SMALL, "--kills", "1"],
    "recipes": ["collectives"],
    "collectives": ["broadcast", "--sizes", "1K", "--rounds", "1"],
}
"""The arguments that each benchmark takes least time with."""


def test_cores_are_those_that_the_process_is_bound_to() -> None:
    bound = os.sched_getaffinity(0)
    assert this_machine().cores <= len(bound)
    os.sched_setaffinity(0, {min(bound)})
    try:
        assert this_machine().cores == 1
    finally:
        os.sched_setaffinity(0, bound)


def version_1(quota: int, limit: int) -> dict[str, str]:
    """Return the files of a control group: microseconds of each 100,000, and bytes."""
    return {
        "cpu/cpu.cfs_quota_us": f"{quota}\n",
        "cpu/cpu.cfs_period_us": "100000\n",
        "memory/memory.limit_in_bytes": f"{limit}\n",
    }


def write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def test_a_quota_and_a_limit_of_the_control_group_count_in_both_versions(tmp_path: Path) -> None:
    cores, memory = len(os.sched_getaffinity(0)), usable_memory(tmp_path)
    assert memory == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    version_2 = {"cpu.max": "max 100000\n", "memory.max": "max\n"}
    write(tmp_path, version_2 | version_1(quota=-1, limit=2**63 - 4096))
    assert (usable_cores(tmp_path), usable_memory(tmp_path)) == (cores, memory), "no limits"
    write(tmp_path, {"cpu.max": "50000 100000\n", "memory.max": f"{2**28}\n"})
    assert (usable_cores(tmp_path), usable_memory(tmp_path)) == (0.5, 2**28)


def test_version_1_has_its_limits_in_a_tree_for_each_controller(tmp_path: Path) -> None:
    own = Path("/proc/self/cgroup").read_text()
    if ":cpu:" not in own or ":memory:" not in own:
        pytest.skip("this system has control groups of version 2 alone")
    write(tmp_path, version_1(quota=75000, limit=2**27))
    assert (usable_cores(tmp_path), usable_memory(tmp_path)) == (0.75, 2**27)


def test_what_is_found_is_told_with_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    machine = this_machine()
    found = Found(values={"took": 1.5}, as_json=False, tell=lambda: print("a table"), nproc=2)
    found.show(machine)
    table, empty, hardware, software = capsys.readouterr().out.splitlines()
    assert (table, empty) == ("a table", "")
    assert hardware.startswith(f"on {machine.cores:g} core")
    threads = threads_per_rank(2)
    for part in (machine.cpu, f"{threads} thread", machine.date, " load ", " GiB"):
        assert part in hardware
    for part in (platform.python_version(), version("torch"), version("megatron-core")):
        assert part in software
    replace(found, as_json=True).show(machine)
    said = json.loads(capsys.readouterr().out)
    assert said.pop("machine") == {
        **vars(machine),
        "gpus": list(machine.gpus),
        "threads_per_rank": threads,
    }
    assert said == {"took": 1.5}


def test_every_benchmark_has_a_smallest_size() -> None:
    assert SMALLEST.keys() == BENCHMARKS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_the_benchmark_prints_json_alone_with_the_machine(name: str, tmp_path: Path) -> None:
    # In a process of its own, which imports Megatron-Core with all that it warns of.
    words = [sys.executable, "-m", "mcore_lab", "bench", name, *SMALLEST[name], "--json"]
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert said["machine"]["torch"] == version("torch")
    assert said["machine"]["cores"] == this_machine().cores
    assert len(said) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number"),
    [*((name, signal.SIGINT) for name in SMALLEST), ("launch", signal.SIGTERM)],
)
def test_a_benchmark_that_is_ended_leaves_no_rank_and_says_a_line_of_ctrl_c(
    name: str, number: signal.Signals, tmp_path: Path
) -> None:
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "mcore_lab", "bench", name, *SMALLEST[name]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"MARK": mark},
    )
    end = time.monotonic() + 120
    while len(_marked(mark)) < 3 and process.poll() is None:  # it, and two ranks at least
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    line = "error: interrupted\n" if number == signal.SIGINT else ""
    assert (process.returncode, said) == (128 + number, line)
    while left := _marked(mark):  # the kernel ends the last of them in its own time
        assert time.monotonic() < end, left
        time.sleep(0.05)


def _marked(mark: str) -> list[int]:
    """Return the processes that have the mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found
