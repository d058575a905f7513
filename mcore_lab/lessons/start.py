"""From a command line to ranks that give a lesson: by `mcore-lab run`, under torchrun, or alone."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, make_dataclass
from typing import Any

import torch.distributed as dist

from mcore_lab.config import exit_with, is_rank_0, parse_settings
from mcore_lab.errors import ConfigError, LabError
from mcore_lab.lessons import LESSONS, load_lesson
from mcore_lab.report.tables import print_json
from mcore_lab.runtime import RankLog, World, choose_device, launch, process_group

LessonFunction = Callable[[Any, World], dict[str, Any] | None]


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every lesson's command line has beside the lesson's own settings."""

    json: bool = False
    """Print what was found as JSON, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class CommonToLaunch(Common):
    """Those of a command that knows how many ranks there are, which else torchrun does."""

    nproc: int | None = None
    """Ranks on this machine; those that the lesson is made for if not set."""


class _ReaderLeftError(LabError):
    """Whoever read what rank 0 prints does so no more: `... | head`."""

    exit_code = 141


def launch_lesson(name: str, argv: Sequence[str]) -> None:
    """Give the lesson on ranks of this machine, as the options say. Raises LabError.

    And BrokenPipeError, as any program that prints does, when nobody reads it any more.
    """
    lesson = load_lesson(name)
    settings, common = _parse(lesson.settings, CommonToLaunch, argv, f"mcore-lab run {name}")
    nproc = LESSONS[name] if common.nproc is None else common.nproc
    device = choose_device(nproc).type
    arguments = (lesson.run, settings, common.json)
    try:
        found = launch(give, nproc, *arguments, device=device, megatron_core=False)[0]
    except _ReaderLeftError:
        raise BrokenPipeError from None
    if common.json:
        print_json(found)


def main(settings: type[Any], lesson: LessonFunction) -> None:
    """Give the lesson of a module that is run: under torchrun as one of its ranks, else alone."""
    spec = sys.modules["__main__"].__spec__
    prog = f"python -m {spec.name}" if spec else sys.argv[0]
    try:
        chosen, common = _parse(settings, Common, sys.argv[1:], prog)
        found = give(lesson, chosen, common.json)
    except _ReaderLeftError as error:
        sys.exit(error.exit_code)
    except LabError as error:
        exit_with(error)
    if common.json and is_rank_0():
        print(json.dumps(found))


def give(lesson: LessonFunction, settings: Any, silent: bool = False) -> dict[str, Any] | None:
    """Give the lesson on this rank, in a process group of plain torch; return what it found."""
    words = contextlib.redirect_stdout(io.StringIO()) if silent else contextlib.nullcontext()
    rank = int(os.environ.get("RANK", "0"))
    try:
        with words, RankLog(rank), process_group(megatron_core=False) as world:
            # A rank that refuses its settings ends: one that still meets it would complain of that.
            dist.barrier()
            found = lesson(settings, world)
            sys.stdout.flush()
            return found
    except BrokenPipeError:
        # Nothing more can be written, not by Python's last flush either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise _ReaderLeftError from None


def _parse(
    settings: type[Any], common: type[Any], argv: Sequence[str], prog: str
) -> tuple[Any, Any]:
    """Return the lesson's settings and the common ones. Raises ConfigError."""
    both = make_dataclass("Options", [], bases=(settings, common), frozen=True, kw_only=True)
    what = (sys.modules[settings.__module__].__doc__ or "").strip()
    parsed: Any = parse_settings(both, argv, prog, what)
    for field in fields(parsed):
        value = getattr(parsed, field.name)
        # Whole numbers are sizes and counts, all others shares, rates and the like.
        least = 1 if type(value) is int and field.name != "seed" else 0
        if isinstance(value, int | float) and value < least:
            option = "--" + field.name.replace("_", "-")
            raise ConfigError(f"{option} must not be below {least}; it is {value}")
    own, shared = (
        kind(**{field.name: getattr(parsed, field.name) for field in fields(kind)})
        for kind in (settings, common)
    )
    return own, shared
