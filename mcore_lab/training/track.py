"""Trackers: where a run's numbers go beside its own folder. `--track tensorboard`, or one's own.

A tracker is any class with the three methods of `Tracker`. Rank 0 alone has one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from mcore_lab.config import Recipe
from mcore_lab.errors import BackendError, ConfigError, LabError
from mcore_lab.training.expert_balance import imbalance

TENSORBOARD = "tensorboard"
_METHODS = ("start", "step", "end")


class Tracker(Protocol):
    """What follows a run. It is made without arguments, on rank 0, when the run begins."""

    def start(self, recipe: Recipe, folder: Path, first_step: int) -> None:
        """Begin, or go on: what was tracked after `first_step` steps is taken anew.

        `folder` is the run's, in which a tracker may write a folder of its own. What this raises
        ends the run before its first step.
        """

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take what was measured of a step, by the names of `metrics.jsonl`.

        What has parts is told of each, as `whole/part`.

        A validation after that step, and the seconds for which the run stood still for it or for
        a checkpoint (`validation_seconds`, `checkpoint_seconds`), come in calls of their own.
        """

    def end(self) -> None:
        """Let go of what is held: the run has ended, well or not."""


def find_tracker(name: str) -> Callable[[], Tracker]:
    """Return what makes the tracker of a name: `tensorboard`, or a class of one's own.

    `module:Class` is found where Python finds modules, and in the working directory. Raises
    BackendError without the library it takes, ConfigError for a name that is no tracker's.
    """
    if name == TENSORBOARD:
        if importlib.util.find_spec("tensorboard") is None:
            raise BackendError(
                "--track tensorboard needs TensorBoard: pip install 'mcore-lab[track]'"
            )
        return _tensorboard
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"--track {name}: it is {TENSORBOARD}, or module:Class")
    try:
        with _working_directory_in_path():
            found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:
        raise ConfigError(f"--track {name}: importing {module} failed: {_what(error)}") from error
    if found is None:
        raise ConfigError(f"--track {name}: there is no {attribute} in {module}")
    lacking = [method for method in _METHODS if not callable(getattr(found, method, None))]
    if not isinstance(found, type) or lacking:
        raise ConfigError(
            f"--track {name}: {attribute} is no class with the methods {', '.join(_METHODS)}"
            + (f"; it lacks {', '.join(lacking)}" if lacking else "")
        )
    return found


def _tensorboard() -> Tracker:
    # It imports torch and TensorBoard: only where it is used.
    from mcore_lab.training.tensorboard import TensorBoard

    return TensorBoard()


@contextmanager
def _working_directory_in_path() -> Iterator[None]:
    """Find modules as `python -m` does: the command `mcore-lab` looks beside itself instead."""
    here = os.getcwd()  # noqa: PTH109 (a path of Python's list is a string)
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


class Tracking:
    """A run's tracker, which can fail without the run.

    A tracker is there to look at a run: one that fails in mid-run (a full disk, a service that is
    down) is left out from then on, and `complain` is called with what it said.
    """

    def __init__(self, name: str | None, complain: Callable[[str], None]) -> None:
        self._name, self._complain = name, complain
        self._tracker: Tracker | None = None

    def start(self, recipe: Recipe, folder: Path, first_step: int) -> None:
        """Make the tracker, if there is to be one, and start it. Raises LabError if it fails."""
        if self._name is None:
            return
        make = find_tracker(self._name)
        try:
            tracker = make()
            tracker.start(recipe, folder, first_step)
        except LabError:
            raise
        except Exception as error:
            raise BackendError(f"--track {self._name} cannot start: {_what(error)}") from error
        self._tracker = tracker

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hand on what was measured, if there is still a tracker."""
        if self._tracker is None:
            return
        try:
            self._tracker.step(step, numbers(metrics))
        except Exception as error:
            self._left_out(f"failed at step {step}", error)

    def end(self) -> None:
        """End the tracker, once."""
        if self._tracker is None:
            return
        try:
            self._tracker.end()
        except Exception as error:
            self._left_out("failed in the end", error)
        self._tracker = None

    def _left_out(self, when: str, error: Exception) -> None:
        self._tracker = None
        self._complain(f"--track {self._name} {when}: {_what(error)}; the run goes on without it")


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return what a line of `metrics.jsonl` measures, but for the step and what is not there.

    What is measured by parts is named `whole/part`; of each layer's experts it is the imbalance.
    """
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if name == "tokens_per_expert":
            layers = (value or {}).items()
            found |= {f"expert_imbalance/{layer}": imbalance(load) for layer, load in layers}
        elif isinstance(value, Mapping):
            found |= {f"{name}/{part}": float(number) for part, number in value.items()}
        elif name != "step" and value is not None:
            found[name] = float(value)
    return found


def _what(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
