"""A run that is told to stop ends after the step it is in, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they take a machine away."""


class StopRequest:
    """Whether this rank has been told to stop; that of one rank is for all of them."""

    def __init__(self) -> None:
        self.is_made = False

    def make(self, *_: object) -> None:
        """Ask: what a signal does."""
        self.is_made = True


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Give a request that SIGTERM and SIGUSR1 make, in the place of ending the process."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        # No other thread may set a handler.
        yield request
        return
    before = {number: signal.signal(number, request.make) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
