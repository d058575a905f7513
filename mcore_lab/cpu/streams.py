"""CUDA streams and events on a CPU, whose work is done when the call returns."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch


class Stream:
    """A stream in program order: whatever was put on it has been done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = self.stream_id = 0
        self._outer: list[Stream] = []

    @property
    def device(self) -> torch.device:
        """The device that this rank has set."""
        return torch.device("cuda", torch.cuda.current_device())

    def wait_event(self, event: Event) -> None:
        """Nothing to wait for."""

    def wait_stream(self, stream: Stream) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Event | None = None) -> Event:
        """Record an event here: now."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All work is done."""
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """A CPU has one priority."""
        return (0, 0)

    def __enter__(self) -> Stream:
        self._outer.append(current_stream())
        set_stream(self)
        return self

    def __exit__(self, *error: object) -> None:
        set_stream(self._outer.pop())


class Event:
    """A point in program order, with its time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Note the time."""
        self._seconds = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All work is done."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, end_event: Event) -> float:
        """Return the milliseconds from this event to `end_event`."""
        return (end_event._seconds - self._seconds) * 1e3


_DEFAULT = Stream()


class _Current(threading.local):
    stream: Stream = _DEFAULT


_current = _Current()


def default_stream(device: object = None) -> Stream:
    """Return the stream that a thread starts with."""
    return _DEFAULT


def current_stream(device: object = None) -> Stream:
    """Return the stream that this thread has set."""
    return _current.stream


def set_stream(stream: Stream | None) -> None:
    """Make `stream` this thread's current stream; `torch.cuda.stream` does so for its body."""
    if stream is not None:
        _current.stream = stream
