"""A run that is told to stop ends after the step it is in, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mcore_lab.errors import LabError, LostPeerError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they take a machine away."""


class StopRequest:
    """Whether this rank has been told to stop; that of one rank is for all of them."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """The last signal that asked, if any has."""

    @property
    def is_made(self) -> bool:
        """Whether anyone has asked."""
        return self.signal is not None

    def make(self, number: int, _: object = None) -> None:
        """Ask: what a signal does."""
        self.signal = number


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Give a request that SIGTERM and SIGUSR1 make, in the place of ending the process.

    If the body fails instead of stopping, the signal ends the process after all: it may have been
    the launcher's, which ends the ranks when one of them has failed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        # No other thread may set a handler.
        yield request
        return
    before = {number: signal.signal(number, request.make) for number in SIGNALS}
    try:
        yield request
    except Exception as error:
        _put_back(before)
        own = isinstance(error, LabError) and not isinstance(error, LostPeerError)
        if request.signal is not None and not own:
            os.kill(os.getpid(), request.signal)
        raise
    finally:
        _put_back(before)


def _put_back(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
