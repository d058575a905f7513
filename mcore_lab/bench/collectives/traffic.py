"""The bytes that ranks send each other over TCP, as the kernel counts them of their sockets."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeAlias

Connection: TypeAlias = tuple[tuple[str, int], tuple[str, int]]
"""Host and port of the own end, and of the other."""

_SENT, _SENT_AGAIN = 200, 208
"""Where `struct tcp_info` of linux/tcp.h has tcpi_bytes_sent and, of these, tcpi_bytes_retrans."""
_LENGTH = _SENT_AGAIN + 8


class Traffic(NamedTuple):
    """Bytes of a rank, without TCP's own headers."""

    sent: int
    received: int


def bytes_sent() -> dict[Connection, int] | None:
    """Return what this process has sent through each TCP socket that it has open.

    None where the kernel does not count it: before Linux 4.19, and elsewhere.
    """
    if not hasattr(socket, "TCP_INFO"):
        return None
    sent = {}
    for number in _sockets():
        # One that listens has no other end, and one that is not TCP's has none of this.
        with (
            suppress(OSError),
            socket.fromfd(number, socket.AF_INET, socket.SOCK_STREAM) as opened,
        ):
            told = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LENGTH)
            if len(told) < _LENGTH:
                return None
            once = _number(told, _SENT) - _number(told, _SENT_AGAIN)
            sent[opened.getsockname()[:2], opened.getpeername()[:2]] = once
    return sent


def among_ranks(sent_by: Sequence[Mapping[Connection, int]]) -> list[Traffic]:
    """Return what each rank has sent to the others and received from them, of what each has sent.

    A rank that looks at what it has received itself would find that the others, which may be ahead
    of it, have sent more meanwhile.
    """
    rank_at = {own: rank for rank, sent in enumerate(sent_by) for own, _ in sent}
    totals = [[0, 0] for _ in sent_by]
    for rank, sent in enumerate(sent_by):
        for (_, other), count in sent.items():
            # Not what goes to the store that the ranks meet at.
            if other in rank_at:
                totals[rank][0] += count
                totals[rank_at[other]][1] += count
    return [Traffic(*total) for total in totals]


def _number(told: bytes, place: int) -> int:
    number: int = struct.unpack_from("Q", told, place)[0]
    return number


def _sockets() -> Iterator[int]:
    for file in Path("/proc/self/fd").iterdir():
        # The one that the folder itself was read with is closed by now.
        with suppress(FileNotFoundError):
            if str(file.readlink()).startswith("socket:"):
                yield int(file.name)
