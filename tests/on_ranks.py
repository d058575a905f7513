"""Tests that run on several ranks: each a process of its own, with real process groups."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mcore_lab import cpu
from mcore_lab.runtime import launch


def on_ranks(
    nproc: int, *, timeout: float = 60, layer: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test run on `nproc` forked ranks, which hold it to `timeout` seconds.

    With `layer` each rank enables `mcore_lab.cpu` first; this process never does.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        def rank(arguments: dict[str, Any]) -> None:
            if layer:
                cpu.enable()
            test(**arguments)

        @functools.wraps(test)
        def test_on_ranks(**arguments: Any) -> None:
            launch(rank, nproc, arguments, timeout=timeout)

        return test_on_ranks

    return decorate
