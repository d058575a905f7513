"""A port that ranks of this machine can meet at."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Return a port of 127.0.0.1 that no program listens at; another may take it meanwhile."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
