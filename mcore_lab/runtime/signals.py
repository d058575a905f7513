"""Signals to the process that launches ranks: none of them is lost, and the ranks hear of each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from torch.distributed.elastic.multiprocessing import SignalException

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""What torch's launcher ends the ranks for when a SignalException names it."""

_SIGNALS = (*ENDING, signal.SIGUSR1)
_CHOICE = "TORCHELASTIC_SIGNALS_TO_HANDLE"
_SECONDS_OF_A_FORK = 0.05
_LAUNCHING = "mcore_lab.runtime.launch"


@contextlib.contextmanager
def signals_reach_the_ranks() -> Iterator[None]:
    """Have torch's launcher end its ranks for the signals that end a process; pass SIGUSR1 on.

    The handlers take the place of those that torch's launcher sets, and are gone at the end. They
    need the main thread: in another, signals stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    choice = os.environ.get(_CHOICE)
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    launching = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != launching:
            _end_as_if_unhandled(number)
        elif _is_forking(frame):
            # Python prints what is raised in the hooks around a fork, and goes on without it.
            threading.Timer(_SECONDS_OF_A_FORK, os.kill, (launching, number)).start()
        else:
            sent = signal.Signals(number)
            raise SignalException(f"process {launching} was sent {sent.name}", sigval=sent)

    for number in ENDING:
        signal.signal(number, stop)
    signal.signal(signal.SIGUSR1, _pass_on)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.pop(_CHOICE, None)
        if choice is not None:
            os.environ[_CHOICE] = choice


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Have SIGTERM raise SystemExit: it would end this process alone, and leave what it started.

    In another thread than the main one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def as_at_the_start_of_a_process() -> None:
    """Let signals end a rank: it has nothing to save yet, and a wait of C++ would not hear them."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _end_as_if_unhandled(number: int) -> None:
    """End a rank that has only just been forked, and has the launching process's handlers."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def _is_forking(frame: FrameType | None) -> bool:
    """Say whether a rank is just being forked: this process may have been forked so itself."""
    while frame is not None:
        where = frame.f_globals.get("__name__"), frame.f_code.co_name
        if where == ("multiprocessing.popen_fork", "_launch"):
            return True
        if where[0] == _LAUNCHING:
            return False
        frame = frame.f_back
    return False


def _pass_on(number: int, _: object) -> None:
    for rank in multiprocessing.active_children():
        if rank.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, number)
