"""The end of a launch, which a rank that is killed in that moment does not hold up."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager


class Ending:
    """What torch's launcher lets its ranks wait for, when they have returned what they computed.

    It takes a `multiprocessing.Event`, whose `set` waits until each process that sleeps in `wait`
    has woken: one that is killed there would be waited for without end.
    """

    def __init__(self, method: str, ranks: int) -> None:
        self._ranks = ranks
        self._may_end = multiprocessing.get_context(method).Semaphore(0)

    def set(self) -> None:
        """Let all ranks end."""
        for _ in range(self._ranks):
            self._may_end.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the rank may end."""
        return self._may_end.acquire(timeout=timeout)


@contextmanager
def ranks_may_be_killed_at_the_end(method: str, ranks: int) -> Iterator[None]:
    """Have torch's launcher of so many ranks take an `Ending` where it makes an event for them."""
    context = multiprocessing.get_context(method)

    def ending_once() -> Ending:
        # Before the ranks are forked, in which an event is an event. The class has it still.
        del context.Event
        return Ending(method, ranks)

    context.Event = ending_once  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        vars(context).pop("Event", None)
