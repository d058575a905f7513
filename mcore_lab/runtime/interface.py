"""The network interface that ranks of several machines meet over, where nobody has chosen one."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket

import psutil

_CHOICE = "GLOO_SOCKET_IFNAME"
_ELSEWHERE = "192.0.2.1"
"""An address of nobody (RFC 5737): the way to it is the way out of this machine."""


def choose_interface(master: str) -> None:
    """Have Gloo use the interface that the way to `master` leads over; a person's choice stays.

    Gloo itself takes the address of the machine's own name, which for many machines is one of the
    loopback interface (Debian: 127.0.1.1) and reaches no other.
    """
    if _CHOICE in os.environ:
        return
    for there in (master, _ELSEWHERE):
        if (name := _interface_towards(there)) is not None:
            os.environ[_CHOICE] = name
            return


def _interface_towards(host: str) -> str | None:
    """Return the interface that a packet to `host` would leave by; None if that is the loopback."""
    with contextlib.suppress(OSError):
        family, kind, protocol, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(there)  # of a datagram socket: nothing is sent
            here = probe.getsockname()[0]
        if ipaddress.ip_address(here).is_loopback:
            return None
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address.partition("%")[0] == here for address in addresses):
                return name
    return None
