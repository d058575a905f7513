"""A rank that waits for others in vain says so in a line: the operation, the group, the seconds."""

from __future__ import annotations

import re
import socket
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch.distributed as dist

from mcore_lab.errors import LostPeerError
from mcore_lab.runtime.together import lost_a_peer

_TIMED_OUT = re.compile(r"timed? ?-?out", re.IGNORECASE)
_WAITED = re.compile(r"(\d+) ?ms")
_REMOTE = re.compile(r"(?:peer |remote=)\[([0-9a-fA-F.:]+)\]")
_COLLECTIVES = "torch.distributed.distributed_c10d"
_MANY = 16


def waited_in_vain(error: BaseException, rank: int, timeout_seconds: float) -> LostPeerError | None:
    """Return what a person is told of an error that another rank's absence has caused, else None.

    What Gloo raises has neither the operation nor the group; they are in the frames that it has
    come through. NCCL ends the process itself, and names them itself.
    """
    if not lost_a_peer(error) or isinstance(error, LostPeerError):
        return None
    text = str(error)
    timed_out = _TIMED_OUT.search(text) is not None
    found = _REMOTE.search(text)
    peer = f" at {found[1]}" if found else ""
    where = f"rank {rank} on {socket.gethostname()}"
    what = _operation(error)
    if timed_out:
        waited = _WAITED.search(text)
        seconds = int(waited[1]) / 1000 if waited else timeout_seconds
        return LostPeerError(
            f"{where} waited {seconds:g} s in {what} for a rank{peer} that did not come: "
            "it hangs, has ended, or is cut off",
            timed_out=True,
        )
    return LostPeerError(f"{where} lost a rank{peer} in {what}: it has failed or was killed")


def _operation(error: BaseException) -> str:
    """Return `all_reduce of _reduce (…mappings), group TENSOR_MODEL_PARALLEL_GROUP, ranks 0, 1`."""
    frames = list(_frames(error))
    caller = next((frame for frame in reversed(frames) if not _is_torchs(frame)), None)
    inside = frames[frames.index(caller) + 1 :] if caller else frames
    collective = next((frame for frame in inside if _module(frame) == _COLLECTIVES), None)
    words = []
    if collective is not None:
        words.append(collective.f_code.co_name)
    if caller is not None:
        words.append(f"{caller.f_code.co_name} ({_module(caller)})")
    group = _group_in(collective or caller)
    return " of ".join(words or ["an operation"]) + (f", {_in_words(group)}" if group else "")


def _frames(error: BaseException) -> Iterator[FrameType]:
    for frame, _ in traceback.walk_tb(error.__traceback__):
        yield frame


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "?"))


def _is_torchs(frame: FrameType) -> bool:
    # What this project puts in the place of torch's is not a caller's either.
    return _module(frame).startswith(("torch.", "mcore_lab.cpu"))


def _group_in(frame: FrameType | None) -> Any:
    """Return the process group that a frame holds; the default one of a collective without."""
    if frame is None:
        return None
    for value in frame.f_locals.values():
        if isinstance(value, dist.ProcessGroup):
            return value
    has_one = _module(frame) == _COLLECTIVES and dist.is_initialized()
    return dist.group.WORLD if has_one else None


def _in_words(group: Any) -> str:
    ranks = dist.get_process_group_ranks(group)
    shown = ", ".join(map(str, ranks[:_MANY])) + (", …" if len(ranks) > _MANY else "")
    name = getattr(group, "group_desc", "") or ""
    return (
        f"group {name} of ranks {shown}"
        if name not in ("", "undefined", "default_pg")
        else f"ranks {shown}"
    )
