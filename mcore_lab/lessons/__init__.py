"""The lessons: parallel training from scratch, in plain torch. Listing them imports no torch.

Each is a module to be read from top to bottom, with `Settings` and a `lesson` that every rank runs.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_lab.errors import ConfigError, nearest

if TYPE_CHECKING:
    from mcore_lab.runtime import World

LESSONS = {
    "collectives": 4,
    "data_parallel": 2,
    "zero": 2,
    "tensor_parallel": 2,
    "vocabulary_parallel": 2,
    "transformer": 2,
    "pipeline_parallel": 4,
    "ring_attention": 4,
    "expert_parallel": 4,
}
"""The lessons in the order to read them, each with the ranks that it is made for."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A lesson, ready to run."""

    name: str
    settings: type[Any]
    """A frozen dataclass of which every field has a default: the lesson's options."""
    run: Callable[[Any, World], dict[str, Any] | None]
    """What every rank does with the settings, in a process group; rank 0 tells and returns it."""


def load_lesson(name: str) -> Lesson:
    """Return the lesson of that name. Raises ConfigError with the near names if there is none."""
    if name not in LESSONS:
        hint = nearest(name, LESSONS) or f"; there is {', '.join(LESSONS)}"
        raise ConfigError(f"no lesson {name}{hint}")
    module = importlib.import_module(f"{__name__}.{name}")
    return Lesson(name=name, settings=module.Settings, run=module.lesson)


def describe(name: str) -> str:
    """Return what the lesson is, in one line: the first of its module's docstring."""
    # Read, not imported: lessons import torch.
    source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
