"""A run that is told to stop ends after the step it is in, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mcore_lab.errors import LabError, LostPeerError


class StopRequest:
    """Whether this rank has been told to stop; that of one rank is for all of them.

    Schedulers tell it by SIGTERM or SIGUSR1 before they take a machine away.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """The last signal that asked, if any has."""
        self._before: dict[signal.Signals, Any] = {}

    @property
    def is_made(self) -> bool:
        """Whether anyone has asked."""
        return self.signal is not None

    def make(self, number: int, _: object = None) -> None:
        """Ask: what a signal does."""
        self.signal = number

    def heed(self, *signals: signal.Signals) -> None:
        """Let these signals ask, in the place of what they do."""
        # No other thread may set a handler.
        if threading.current_thread() is threading.main_thread():
            for number in signals:
                self._before[number] = signal.signal(number, self.make)

    def heed_no_more(self) -> None:
        """Let the signals do what they did before."""
        while self._before:
            signal.signal(*self._before.popitem())


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Give a request that SIGUSR1 makes in the place of ending the process, and may SIGTERM too.

    SIGTERM is to be heeded when the first step begins. Until then there is nothing to save, and it
    has to end this process: it is the launcher's where another rank has failed, for which this one
    may wait in C++, deaf to Python's handlers. If the body fails instead of stopping, the signal
    ends the process after all.
    """
    request = StopRequest()
    request.heed(signal.SIGUSR1)
    try:
        yield request
    except Exception as error:
        request.heed_no_more()
        own = isinstance(error, LabError) and not isinstance(error, LostPeerError)
        if request.signal is not None and not own:
            os.kill(os.getpid(), request.signal)
        raise
    finally:
        request.heed_no_more()
