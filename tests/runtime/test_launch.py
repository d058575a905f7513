"""Ranks that `launch` forks: their results, their failures, and what is left of them afterwards."""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mcore_lab import cpu
from mcore_lab.errors import BackendError, LayoutError, RankFailedError
from mcore_lab.runtime import choose_device, launch, process_group, threads_per_rank
from mcore_lab.runtime.ending import Ending
from mcore_lab.runtime.ports import free_port

SECONDS = 60.0


def _rank() -> int:
    return int(os.environ["RANK"])


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


def _sum_of_ranks() -> float:
    with process_group():
        total = torch.full((1,), float(dist.get_rank()))
        dist.all_reduce(total)
        return total.item()


def test_results_are_in_the_order_of_the_ranks() -> None:
    def numbered(first: int, step: int) -> tuple[int, str]:
        return first + step * _rank(), os.environ["WORLD_SIZE"]

    assert launch(numbered, 3, 10, 2, timeout=SECONDS) == [(10, "3"), (12, "3"), (14, "3")]


def test_results_may_be_large_tensors() -> None:
    results = launch(lambda: torch.full((1_000_000,), _rank()), 2, timeout=SECONDS)
    assert [(result.numel(), result.unique().tolist()) for result in results] == [
        (1_000_000, [0]),
        (1_000_000, [1]),
    ]


def test_eight_ranks_start_and_meet() -> None:
    assert launch(_sum_of_ranks, 8, timeout=SECONDS) == [28.0] * 8


def test_an_error_for_a_person_arrives_as_itself() -> None:
    def refuse() -> None:
        with process_group():
            if _rank() == 1:
                raise LayoutError("8 heads do not fit 3 ranks")
            dist.barrier()

    with _within(10), pytest.raises(LayoutError) as raised:
        launch(refuse, 2, timeout=SECONDS)
    assert str(raised.value) == "8 heads do not fit 3 ranks"
    assert raised.value.exit_code == 2


def test_another_error_names_its_rank_with_its_traceback_and_not_its_peers() -> None:
    def fail_in_the_middle() -> None:
        with process_group():
            dist.barrier()
            if _rank() == 1:
                raise ValueError("the first to fail")
            dist.barrier()

    with _within(10), pytest.raises(RankFailedError) as raised:
        launch(fail_in_the_middle, 3, timeout=SECONDS)
    message = str(raised.value)
    assert message.startswith("rank 1 failed:")
    assert "in fail_in_the_middle" in message
    assert message.rstrip().endswith("ValueError: the first to fail")
    assert "onnection closed" not in message


def test_a_rank_that_fails_before_the_group_exists_ends_those_that_wait_for_it() -> None:
    def fail_early() -> None:
        if _rank() == 0:
            raise ValueError("before anyone met")
        _sum_of_ranks()

    with _within(10), pytest.raises(RankFailedError, match="rank 0 failed") as raised:
        launch(fail_early, 3, timeout=SECONDS)
    assert "ValueError: before anyone met" in str(raised.value)


def test_a_rank_that_is_killed_is_named_within_ten_seconds() -> None:
    def kill_one() -> None:
        with process_group():
            dist.barrier()
            if _rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.barrier()

    with _within(10), pytest.raises(RankFailedError, match="rank 1 was killed by SIGKILL"):
        launch(kill_one, 3, timeout=SECONDS)


def test_ranks_that_hang_are_ended_at_the_time_limit_with_their_stacks() -> None:
    def never_come() -> None:
        with process_group():
            if _rank() == 0:
                signal.pause()
            dist.barrier()

    with _within(15), pytest.raises(RankFailedError, match="the time limit ended") as raised:
        launch(never_come, 2, timeout=4)
    assert "in never_come" in str(raised.value)


def test_a_rank_that_exits_is_named_with_its_status() -> None:
    def leave() -> None:
        if _rank() == 1:
            os._exit(3)
        signal.pause()

    with _within(10), pytest.raises(RankFailedError, match="rank 1 exited with status 3"):
        launch(leave, 2, timeout=SECONDS)


def test_a_result_that_cannot_be_pickled_is_an_error_of_its_rank() -> None:
    with pytest.raises(RankFailedError, match=r"rank \d failed:") as raised:
        launch(lambda: lambda: None, 2, timeout=SECONDS)
    assert "pickle" in str(raised.value)


def test_ranks_may_leave_their_process_group_open() -> None:
    def leave_it_open() -> int:
        cpu.enable()
        dist.init_process_group("nccl")
        dist.barrier()
        return dist.get_rank()

    assert launch(leave_it_open, 2, timeout=SECONDS) == [0, 1]


def test_launching_changes_nothing_in_the_launching_process() -> None:
    def state() -> tuple[object, ...]:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
        handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        return torch.ones(1).type(), torch.get_num_threads(), dict(os.environ), handlers, children

    launch(cpu.enable, 2, timeout=SECONDS)
    before = state()
    launch(_sum_of_ranks, 2, timeout=SECONDS)
    with pytest.raises(RankFailedError):
        launch(signal.raise_signal, 2, signal.SIGKILL, timeout=SECONDS)
    assert state() == before
    assert not cpu.is_enabled()
    assert not dist.is_initialized()


def test_ranks_may_use_openmp_after_the_launching_process_did() -> None:
    def multiply() -> float:
        torch.set_num_threads(2)
        x = torch.ones(500, 500)
        return (x @ x).mean().item()

    threads = torch.get_num_threads()
    assert multiply() == 500
    torch.set_num_threads(threads)
    assert launch(multiply, 2, timeout=20) == [500, 500]


def test_ranks_may_collect_garbage_after_a_launch_that_failed() -> None:
    def fail_and_forget() -> None:
        with contextlib.suppress(RankFailedError):
            launch(os._exit, 2, 1, timeout=SECONDS)

    gc.disable()
    try:
        for _ in range(3):
            fail_and_forget()
        assert launch(lambda: gc.collect() >= 0, 2, timeout=SECONDS) == [True, True]
    finally:
        gc.enable()


def test_ranks_share_the_cores_evenly() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_per_rank(1) == cores
    assert threads_per_rank(cores + 1) == 1
    assert launch(torch.get_num_threads, 2, timeout=SECONDS) == [max(1, cores // 2)] * 2


HANGING = """
import os, signal
import torch.distributed as dist
from mcore_lab.runtime import launch, process_group
def hang():
    with process_group():
        os.write(1, b"%d\\n" % os.getpid())
        if dist.get_rank() == 0:
            signal.pause()
        dist.barrier()
launch(hang, 2)
"""


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("number", "whole_group"),
    [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGKILL, False)],
    ids=["ctrl_c", "terminated", "killed"],
)
def test_no_rank_outlives_the_launching_process(number: signal.Signals, whole_group: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HANGING],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    ranks = [int(process.stdout.readline()) for _ in range(2)]
    with _within(10):
        (os.killpg if whole_group else os.kill)(process.pid, number)
        assert process.wait(SECONDS) != 0
        while any(map(_is_alive, ranks)):
            time.sleep(0.05)


SIGNALLED_WHILE_FORKING = """
import os, signal
from mcore_lab.errors import RankFailedError
from mcore_lab.runtime import launch
def once(number):
    numbers = [number]
    return lambda: numbers and os.kill(os.getpid(), numbers.pop())
for moment, number in (
    ("before", signal.SIGINT),
    ("before", signal.SIGTERM),
    ("after_in_parent", signal.SIGINT),
    ("after_in_child", signal.SIGTERM),
):
    os.register_at_fork(**{moment: once(number)})
    try:
        launch(signal.pause, 2, timeout=20)
    except (KeyboardInterrupt, SystemExit, RankFailedError) as error:
        print(type(error).__name__, str(error).partition(" (")[0])
"""


def test_a_signal_in_the_moment_of_a_fork_is_neither_lost_nor_printed() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SIGNALLED_WHILE_FORKING],
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "KeyboardInterrupt ",
        "SystemExit 143",
        "KeyboardInterrupt ",
        "RankFailedError rank 0 was killed by SIGTERM",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is chosen without a GPU")
def test_without_gpus_the_cpu_is_chosen_and_cuda_refused() -> None:
    chosen = choose_device(2)
    assert (chosen.type, chosen.communication) == ("cpu", "gloo")
    assert chosen.reason == "no GPUs for 2 ranks"
    assert choose_device(2, "cpu").reason == "the CPU was asked for"
    with pytest.raises(BackendError, match="no GPUs for 2 ranks"):
        choose_device(2, "cuda")


def _fork_and_be_killed(folder: Path) -> None:
    forked = os.fork()
    if forked == 0:
        signal.pause()
    (folder / str(_rank())).write_text(str(forked))
    if _rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def test_what_a_killed_rank_had_forked_ends_with_it(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match="rank 0 was killed by SIGKILL"):
        launch(_fork_and_be_killed, 2, tmp_path, timeout=SECONDS)
    forked = int((tmp_path / "0").read_text())
    deadline = time.monotonic() + SECONDS
    while Path(f"/proc/{forked}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_port_that_another_program_takes_meanwhile_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launching = importlib.import_module("mcore_lab.runtime.launch")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ports = iter([other.getsockname()[1], free_port()])
        monkeypatch.setattr(launching, "free_port", lambda: next(ports))
        assert launch(_rank, 2) == [0, 1]
        assert not list(ports)


def test_no_free_port_at_all_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    launching = importlib.import_module("mcore_lab.runtime.launch")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setattr(launching, "free_port", lambda: other.getsockname()[1])
        with pytest.raises(RankFailedError, match="no rank was started: each of 5 ports"):
            launch(_rank, 2)


@pytest.mark.parametrize("killed", [[0], [0, 1]])
def test_a_rank_that_is_killed_when_all_have_finished_holds_up_nobody(
    killed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    let_end = Ending.set

    def kill_first(self: Ending) -> None:
        ranks = multiprocessing.active_children()
        for number in killed:
            pid = ranks[number].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            ranks[number].join(SECONDS)
        let_end(self)

    monkeypatch.setattr(Ending, "set", kill_first)
    with _within(20), pytest.raises(RankFailedError, match=r"rank \d was killed by SIGKILL"):
        launch(_rank, 2, timeout=SECONDS)
    assert "Event" not in vars(multiprocessing.get_context("fork"))


def test_a_signal_ends_a_launch_in_a_process_that_was_forked_itself() -> None:
    context = multiprocessing.get_context("fork")
    started = context.Semaphore(0)

    def hang() -> None:
        started.release()
        signal.pause()

    process = context.Process(target=launch, args=(hang, 2))
    process.start()
    assert all(started.acquire(timeout=SECONDS) for _ in range(2))
    process.terminate()
    process.join(20)
    assert process.exitcode == 128 + signal.SIGTERM
