"""What a person sees of a run: a live bar on a terminal, a line a step in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mcore_lab.training.metrics import StepMetrics


class Console:
    """Tells a person how a run goes; only rank 0 has one that speaks."""

    def __init__(self, *, speaks: bool) -> None:
        self._speaks = speaks
        self._bar = _bar() if speaks and sys.stdout.isatty() else None
        self._digits = 1
        self._last_step, self._unit = 0, "rank"

    def begin(self, first_step: int, last_step: int, unit: str = "rank") -> None:
        """Show the bar, where there is one; `unit` is what a rank is, for a person."""
        self._last_step, self._unit = last_step, unit
        self._digits = len(str(last_step))
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("", total=last_step, completed=first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the terminal as it was."""
        if self._bar:
            self._bar.stop()

    def say(self, message: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar:
            self._bar.console.print(message, highlight=False, markup=False, soft_wrap=True)
        elif self._speaks:
            print(message, flush=True)

    def step(self, metrics: StepMetrics) -> None:
        """Show a step that was taken."""
        text = f"loss {metrics.loss:.4f}  {metrics.tokens_per_second:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=metrics.step, description=text)
        else:
            step = f"step {metrics.step:>{self._digits}}/{self._last_step}"
            text = f"{step}  {text}  grad norm {metrics.grad_norm:.4f}  lr {metrics.lr:.2e}"
            self.say("  ".join([text, *self._what_there_is(metrics)]))

    def _what_there_is(self, metrics: StepMetrics) -> Iterator[str]:
        if metrics.tflops_per_rank is not None:
            yield f"{metrics.tflops_per_rank:.3g} TFLOP/s a {self._unit}"
        if metrics.mfu is not None:
            yield f"MFU {metrics.mfu:.1%}"
        if metrics.expert_imbalance is not None:
            yield f"expert imbalance {metrics.expert_imbalance:.2f}"


def _bar() -> Progress:
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
