"""What a person sees of a run: a live bar on a terminal, a line a step in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mcore_lab.training.metrics import StepMetrics

_GAP = "  "
_BARS = (40, 20, 10, 5)
"""Widths of a bar; words come first."""


class Console:
    """Tells a person how a run goes; only rank 0 has one that speaks."""

    def __init__(self, *, speaks: bool) -> None:
        self._speaks = speaks
        self._bar = _Bar() if speaks and sys.stdout.isatty() else None
        self._digits = 1
        self._last_step, self._unit = 0, "rank"

    def begin(self, first_step: int, last_step: int, unit: str = "rank") -> None:
        """Show the bar, where there is one; `unit` is what a rank is, for a person."""
        self._last_step, self._unit = last_step, unit
        self._digits = len(str(last_step))
        if self._bar:
            self._bar.begin(first_step, last_step)

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
        speed = f"{metrics.tokens_per_second:,.0f} tokens/s"
        first, more = [f"loss {metrics.loss:.4f}", speed], [*self._what_there_is(metrics)]
        if self._bar:
            self._bar.show(metrics.step, [*first, *more])
        elif self._speaks:
            step = f"step {metrics.step:>{self._digits}}/{self._last_step}"
            norm, lr = f"grad norm {metrics.grad_norm:.4f}", f"lr {metrics.lr:.2e}"
            self.say(_GAP.join([step, *first, norm, lr, *more]))

    def _what_there_is(self, metrics: StepMetrics) -> Iterator[str]:
        if metrics.tflops_per_rank is not None:
            yield f"{metrics.tflops_per_rank:.3g} TFLOP/s/{self._unit}"
        if metrics.mfu is not None:
            yield f"MFU {metrics.mfu:.1%}"
        if metrics.expert_imbalance is not None:
            yield f"expert imbalance {metrics.expert_imbalance:.2f}"


class _Bar(Progress):
    """A bar of one line, however wide the terminal is: it tells what there is room for."""

    def __init__(self) -> None:
        self._drawn = BarColumn(bar_width=_BARS[0])
        super().__init__(
            TextColumn("step"),
            MofNCompleteColumn(),
            self._drawn,
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(),
        )

    def begin(self, first_step: int, last_step: int) -> None:
        """Show it."""
        self._beside = len(f"step {last_step}/{last_step}    -:--:--")
        self._task = self.add_task("", total=last_step, completed=first_step)
        self._fit([])
        self.start()

    def show(self, step: int, words: Sequence[str]) -> None:
        """Show the step, and of the words the first that there is room for."""
        self.update(self._task, completed=step, description=self._fit(words))

    def _fit(self, words: Sequence[str]) -> str:
        room = self.console.width - self._beside
        texts = [_GAP.join(words[:count]) for count in range(len(words), -1, -1)]
        text = next((text for text in texts if len(text) + _BARS[-1] <= room), "")
        self._drawn.bar_width = next((bar for bar in _BARS if len(text) + bar <= room), _BARS[-1])
        return text
