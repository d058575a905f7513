"""The errors a person sees: each is one message without a traceback, and an exit status."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import partial
from typing import Any


class LabError(Exception):
    """Something that a person can put right. The command line prints it and exits with `exit_code`.

    The message says what is wrong, with the numbers, and what would work.
    """

    exit_code = 2


class ConfigError(LabError):
    """A recipe, an override or a TOML file that cannot be used as it is."""


class LayoutError(LabError):
    """A layout that the model, the data or the number of ranks does not allow."""


class DataError(LabError):
    """Training data that is missing, unreadable or too small."""


class RunFolderError(LabError):
    """A run folder that exists already, or that cannot be written."""


class CheckpointError(LabError):
    """A checkpoint that is missing, unreadable, or of another model."""


class BackendError(LabError):
    """A backend, a device or a library that this machine does not have."""


class RankFailedError(LabError):
    """A rank that failed in mid-run, after it had started well."""

    exit_code = 1


class LostPeerError(RankFailedError):
    """A rank that waited in a collective for one that did not come."""

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out
        """Whether the time limit ended it; else the connection was lost."""

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(LostPeerError, timed_out=self.timed_out), self.args


class NotFiniteError(LabError):
    """A loss or a gradient that no step can be taken with."""

    exit_code = 1


class PreemptedError(LabError):
    """A run that a signal has stopped after a step; the exit status asks to be started again."""

    exit_code = 75
    """sysexits.h: a temporary failure, to be tried again."""


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Return `; did you mean …?` with the known names nearest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=limit, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""
