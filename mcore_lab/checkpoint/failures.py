"""What goes wrong in reading or writing a checkpoint, as one error with one reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint import CheckpointException

from mcore_lab.checkpoint.trust import refusal
from mcore_lab.errors import CheckpointError, LabError
from mcore_lab.runtime.together import lost_a_peer

_WANTED = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")
_NOT_WEIGHTS = re.compile(r"Weights only load failed.*Unpickler error: ([^\n]+)", re.DOTALL)
"""What torch's weights-only unpickler says, after advice to load it all the same."""

_WRITER = "inline_container.cc"
"""Of torch.save, which says where in the file it was but not what the system said."""


@contextmanager
def failures_explained(verb: str, path: Path) -> Iterator[None]:
    """Raise what the body raises as CheckpointError: Megatron-Core, torch, pickle have many kinds.

    A LabError passes, and so does the loss of another rank, whose failure is the one to tell.
    """
    try:
        yield
    except LabError:
        raise
    # torch's CheckpointException is no Exception.
    except (Exception, CheckpointException) as error:
        if lost_a_peer(error):
            raise
        raise CheckpointError(f"cannot {verb} the checkpoint {path}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    whole = str(_cause(error)).strip()
    if wanted := _WANTED.search(whole):
        return refusal(wanted[1])
    if refused := _NOT_WEIGHTS.search(whole):
        return f"a pickle in it is none that torch.save writes, and is refused: {refused[1]}"
    reason = whole.partition("\n")[0] or type(error).__name__
    if _WRITER in reason and "unexpected pos" in reason:
        return "less was written than was to be: a full disk, or a limit on the size of files"
    return reason


def _cause(error: BaseException) -> BaseException:
    """Return the failure of the first rank that torch's CheckpointException gathers."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else ()
    return next((failure for failure, _ in failures), error)
