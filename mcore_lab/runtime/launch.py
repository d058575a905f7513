"""Start ranks on this machine: on CPU, forked from a process that has imported Megatron-Core."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import gc
import logging
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mcore_lab import cpu
from mcore_lab.errors import LabError, PreemptedError, RankFailedError
from mcore_lab.runtime.device import threads_per_rank
from mcore_lab.runtime.ending import ranks_may_be_killed_at_the_end
from mcore_lab.runtime.ports import free_port
from mcore_lab.runtime.signals import as_at_the_start_of_a_process, signals_reach_the_ranks
from mcore_lab.runtime.together import lost_a_peer

T = TypeVar("T")
_LOST_PEER_SECONDS = 3.0
_START_SECONDS = 120
_PORTS = 5
_OMP_PAUSE_HARD = 2
_PR_SET_PDEATHSIG = 1
_TALKATIVE = ("torch.distributed.elastic", "torch.multiprocessing.spawn")


def launch(
    function: Callable[..., T],
    nproc: int,
    *args: Any,
    timeout: float | None = None,
    device: str = "cpu",
    megatron_core: bool = True,
) -> list[T]:
    """Run `function(*args)` in `nproc` ranks on this machine and return what each returned.

    The ranks find torchrun's environment (`RANK`, `WORLD_SIZE`, …); results must be picklable. On
    `cpu` they are forked, 8 in under a second, from this process, which imports Megatron-Core first
    if they use it. On `cuda`, which a forked process cannot use, they are started anew, and the
    function and its arguments must be picklable too.
    A rank that fails brings the others down. A LabError of a rank is raised here as it is; of any
    other failure RankFailedError names the rank and gives its traceback. After `timeout` seconds
    the ranks are ended and the stacks they hung in are shown.
    """
    method = "spawn" if device == "cuda" else "fork"
    if method == "fork":
        if megatron_core:
            cpu.preload()
        _end_openmp_threads()
    with (
        tempfile.TemporaryDirectory(prefix="mcore_lab-") as folder,
        _quiet(),
        signals_reach_the_ranks(),
        ranks_may_be_killed_at_the_end(method, nproc),
        _frozen_garbage(),
    ):
        all_started = multiprocessing.get_context(method).Barrier(nproc)
        rank_arguments = (Path(folder), timeout, all_started, function, args)
        try:
            _on_a_free_port(nproc, method, rank_arguments)
            return [pickle.loads(_result(Path(folder), rank).read_bytes()) for rank in range(nproc)]
        except ChildFailedError as error:
            raise _first_failure(error.failures, Path(folder)) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            for left in _failures_left(Path(folder)):
                # What the ranks made of the signal that was passed on to them.
                if isinstance(left.error, PreemptedError):
                    raise left.error from None
            raise SystemExit(128 + int(error.sigval)) from None


def _result(folder: Path, rank: int) -> Path:
    """Return the file that a rank leaves what it returned in.

    Not torch's queue: of a rank that is killed while it writes a large result to a pipe, the
    launching process would wait for the rest.
    """
    return folder / f"result-{rank}"


def _on_a_free_port(nproc: int, method: str, rank_arguments: tuple[Any, ...]) -> None:
    """Start the ranks, which meet at a port of this machine, and wait until they have ended."""
    for _ in range(_PORTS):
        ranks = elastic_launch(_config(nproc, method, free_port()), _rank_main)
        try:
            ranks(*rank_arguments)
            return
        except DistNetworkError as error:
            # Another program has taken it meanwhile; no rank has been started.
            if "EADDRINUSE" not in str(error):
                raise
    raise RankFailedError(f"no rank was started: each of {_PORTS} ports was taken by others")


def _config(nproc: int, method: str, port: int) -> LaunchConfig:
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    # No handlers but ours; earlier releases of torch cannot be asked, and set theirs over them.
    without_torchs_handlers: dict[str, Any] = (
        {"signals_to_handle": ""} if "signals_to_handle" in known else {}
    )
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        # Among the ranks of one machine there is nobody to wait for: the other ways to meet wait a
        # random third of a second for more to come.
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"rank": 0, "timeout": _START_SECONDS},
        local_addr="127.0.0.1",
        max_restarts=0,
        # Seconds between two looks at whether all have ended: every 20 ms would take 1 % of a core.
        monitor_interval=0.05,
        start_method=method,
        **without_torchs_handlers,
    )


def _end_openmp_threads() -> None:
    """End the threads that OpenMP keeps; it starts new ones when it needs them.

    Threads do not survive a fork: a rank would wait for the help of those it believes it has.
    """
    with contextlib.suppress(OSError):
        for library in set(re.findall(r"/\S*libgomp\S*", Path("/proc/self/maps").read_text())):
            ctypes.CDLL(library).omp_pause_resource_all(_OMP_PAUSE_HARD)


@contextlib.contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Let a forked rank not collect what is garbage here.

    It would run the destructors of an earlier launch's stores, whose threads are not in the rank.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from telling of a failure as well: once, and by us, is enough."""
    # Each of them has a level of its own, so that a parent's does not count.
    known = logging.root.manager.loggerDict
    loggers = [logging.getLogger(name) for name in known if name.startswith(_TALKATIVE)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclasses.dataclass(frozen=True)
class _Failure:
    """What a rank leaves behind when it fails."""

    rank: int
    seconds: float
    error: LabError | None
    text: str


def _rank_main(
    folder: Path,
    timeout: float | None,
    all_started: Barrier,
    function: Callable[..., T],
    args: tuple[Any, ...],
) -> None:
    as_at_the_start_of_a_process()
    # 0.16 writes checkpoints in processes that the rank forks, which would wait for it for ever.
    end_with_parent()
    os.register_at_fork(after_in_child=end_with_parent)
    # The launching process serves the store from a thread that takes glibc's resolver lock for each
    # rank that connects. A rank forked in that moment would find the lock taken for good.
    all_started.wait(_START_SECONDS)
    rank = int(os.environ["RANK"])
    threads = threads_per_rank(int(os.environ["LOCAL_WORLD_SIZE"]))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    with (folder / f"stacks-{rank}").open("w") as stacks:
        if timeout is not None:
            faulthandler.dump_traceback_later(timeout, exit=True, file=stacks)
        try:
            _result(folder, rank).write_bytes(pickle.dumps(function(*args)))
        except BaseException as error:
            _leave_failure(folder, rank, error)
            if lost_a_peer(error):
                # The rank that was lost is the one to name: let it be seen to end before this one.
                time.sleep(_LOST_PEER_SECONDS)
            _exit_without_a_word(error)
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, however it ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _leave_failure(folder: Path, rank: int, error: BaseException) -> None:
    known = error if isinstance(error, LabError) else None
    failure = _Failure(rank, time.time(), known, traceback.format_exc())
    (folder / f"failure-{rank}").write_bytes(pickle.dumps(failure))


def _exit_without_a_word(error: BaseException) -> None:
    """The launching process tells the story; a rank that told it too would tell it twice."""
    code = error.exit_code if isinstance(error, LabError) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _stacks(folder: Path) -> str:
    """Return what the ranks that reached the time limit were doing."""
    texts = ((path.name, path.read_text()) for path in sorted(folder.glob("stacks-*")))
    return "\n".join(f"{name}:\n{text}" for name, text in texts if text)


def _failures_left(folder: Path) -> list[_Failure]:
    return [pickle.loads(path.read_bytes()) for path in folder.glob("failure-*")]


def _first_failure(failures: dict[int, ProcessFailure], folder: Path) -> LabError:
    """Find the failure that brought the others down.

    The time limit comes first, then a rank killed from outside: the others fail in their next
    collective. Else it is the rank that failed earliest by its own clock.
    """
    stacks = _stacks(folder)
    if stacks:
        return RankFailedError(f"the time limit ended the ranks; where they were:\n{stacks}")
    for rank, failure in failures.items():
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            return RankFailedError(f"rank {rank} was killed by {name} (process {failure.pid})")
    if left := _failures_left(folder):
        first = min(left, key=lambda failure: failure.seconds)
        return first.error or RankFailedError(f"rank {first.rank} failed:\n{first.text}")
    rank, failure = next(iter(failures.items()))
    return RankFailedError(f"rank {rank} exited with status {failure.exitcode}")
