"""Where the time of a step goes on a rank: data, forward, backward, gradients, optimizer.

Megatron-Core's schedules tell of their passes to whatever stands in `config.timers`: its own
timers wait for the GPU at each mark, these do not. On CPU a mark is a reading of the clock. On CUDA
it is an event on the current stream, which is read once the step's loss has been waited for anyway;
the optimizer's time there is the CPU's, and its last kernels run on into the next step.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

T = TypeVar("T")

_DATA, _GRADIENTS, _OPTIMIZER = "data", "gradients", "optimizer"
_FORWARD, _BACKWARD, _SCHEDULE = "forward-compute", "backward-compute", "forward-backward"
"""Megatron-Core's names; the last is all of a schedule, gradients included."""


class Phases:
    """Adds up a rank's time by phase; without `watch` it does nothing."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._is_watching, self._has_stages = False, False
        self._clock = clock
        self._now: Callable[[], Any] = clock
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._timers: dict[str, _Timer] = {}

    def watch(self, config: TransformerConfig, device_type: str) -> None:
        """Have Megatron-Core tell of the passes, and of the gradients that are made final."""
        self._is_watching = True
        self._has_stages = config.pipeline_model_parallel_size > 1
        if device_type == "cuda":
            self._now = _event
        config.timers = self
        finalize = config.finalize_model_grads_func

        def timed(*args: Any, **kwargs: Any) -> None:
            with self.of(_GRADIENTS):
                finalize(*args, **kwargs)

        config.finalize_model_grads_func = timed

    def __call__(self, name: str, log_level: int = 0) -> _Timer:
        """Return the timer of a name: what Megatron-Core asks `config.timers` for."""
        timer = self._timers.get(name)
        if timer is None:
            timer = self._timers[name] = _Timer(self._now, self._spans[name])
        return timer

    def reading(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the batches; what it takes to make them is not of the pass that asks for them."""
        if not self._is_watching:
            yield from batches
            return
        while True:
            with self.of(_DATA):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Add what the body takes to a phase."""
        if not self._is_watching:
            yield
            return
        timer = self(name)
        timer.start()
        try:
            yield
        finally:
            timer.stop()

    @contextmanager
    def of_optimizer(self) -> Iterator[None]:
        """Add what the body takes to the optimizer's phase, by the CPU's clock."""
        started = self._clock()
        yield
        if self._is_watching:
            self._spans[_OPTIMIZER].append((started, self._clock()))

    def begin(self) -> None:
        """Forget what was before: a step begins."""
        for spans in self._spans.values():
            spans.clear()

    def take(self, seconds: float) -> dict[str, float] | None:
        """Return the seconds of each phase of a step that took so many; None if none is watched.

        `pipeline` is what a schedule spends in no pass: messages between stages, and the wait for
        them. `other` is the rest, mostly the wait for other ranks before the optimizer's step.
        """
        if not self._is_watching:
            return None
        took = {name: sum(map(_length, spans)) for name, spans in self._spans.items()}
        data, gradients = took.get(_DATA, 0.0), took.get(_GRADIENTS, 0.0)
        # A pass asks for its batch itself.
        forward = took.get(_FORWARD, 0.0) - data
        backward, optimizer = took.get(_BACKWARD, 0.0), took.get(_OPTIMIZER, 0.0)
        phases = {_DATA: data, "forward": forward, "backward": backward}
        if self._has_stages:
            schedule = took.get(_SCHEDULE, 0.0)
            phases["pipeline"] = max(schedule - data - forward - backward - gradients, 0.0)
        phases |= {_GRADIENTS: gradients, _OPTIMIZER: optimizer}
        return phases | {"other": max(seconds - sum(phases.values()), 0.0)}


class _Timer:
    """What Megatron-Core starts and stops; `barrier` is of its own timers, which can wait."""

    def __init__(self, now: Callable[[], Any], spans: list[tuple[Any, Any]]) -> None:
        self._now, self._spans = now, spans
        self._started: Any = None

    def start(self, barrier: bool = False) -> None:
        self._started = self._now()

    def stop(self, barrier: bool = False) -> None:
        if self._started is not None:
            self._spans.append((self._started, self._now()))
            self._started = None


def _event() -> torch.cuda.Event | None:
    """Mark the current stream; nothing that a CUDA graph will repeat can be marked."""
    if torch.cuda.is_current_stream_capturing():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _length(span: tuple[Any, Any]) -> float:
    """Return the seconds between two marks."""
    start, end = span
    if end is None:
        return 0.0
    if isinstance(end, float):
        return float(end - start)
    # Done long ago, but for what another stream may still do.
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
