"""Machines of a network: each a network namespace with an address and a name of its own.

All of it is this machine's kernel: `ip netns`, and a bridge in a namespace of its own as the
switch, so that nothing of the machine's own network is touched. Needs root and Debian's iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

# As a machine of Debian is set up: its own name is that of an address no other can reach. There is
# no name server to wait for. All of it is gone with the process.
_AS_A_MACHINE = """\
hostname "$1" && mount --bind "$2" /etc/hosts && mount --bind /dev/null /etc/resolv.conf &&
shift 2 && exec "$@"
"""


class Nodes:
    """`node-0`, `node-1`, … on one switch, at 10.77.0.1, 10.77.0.2, …"""

    def __init__(self, count: int, folder: Path) -> None:
        self.count = count
        self._folder = folder
        self._spaces = [f"mcore-lab-{os.getpid()}-{node}" for node in range(count)]
        self._switch = f"mcore-lab-{os.getpid()}-switch"

    def start(self, node: int, *words: str) -> subprocess.Popen[str]:
        """Start a program on a node, in a process group of its own."""
        name, hosts = f"node-{node}", self._folder / f"hosts-{node}"
        shell = ["unshare", "--uts", "--mount", "sh", "-c", _AS_A_MACHINE, "sh", name, str(hosts)]
        return subprocess.Popen(
            ["ip", "netns", "exec", self._spaces[node], *shell, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self._folder,
            start_new_session=True,
        )

    def cut_off(self, node: int) -> None:
        """Pull the node's cable out of the switch."""
        _ip("-n", self._switch, "link", "set", f"port-{node}", "down")

    def kill(self, node: int) -> None:
        """End all that runs on the node, at once and without a word."""
        for process in _ip("netns", "pids", self._spaces[node]).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)

    def _build(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "switch", "up", "type", "bridge")
        for node, space in enumerate(self._spaces):
            _ip("netns", "add", space)
            port = f"port-{node}"
            peer = ("type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("-n", self._switch, "link", "add", port, *peer)
            _ip("-n", self._switch, "link", "set", port, "master", "switch", "up")
            _ip("-n", space, "address", "add", f"10.77.0.{node + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", space, "link", "set", device, "up")
            _ip("-n", space, "route", "add", "default", "via", "10.77.0.254")
            # torchrun's agent that is cut off from its store waits as long as TCP tries again: by
            # default for a quarter of an hour.
            retries = "net.ipv4.tcp_retries2=3"
            _ip("netns", "exec", space, "sysctl", "-q", "-w", retries)
            others = [f"10.77.0.{n + 1} node-{n}" for n in range(self.count) if n != node]
            lines = ["127.0.0.1 localhost", f"127.0.1.1 node-{node}", *others]
            (self._folder / f"hosts-{node}").write_text("\n".join(lines) + "\n")

    def _remove(self) -> None:
        for node, space in enumerate(self._spaces):
            if Path("/run/netns", space).exists():
                self.kill(node)
                _ip("netns", "delete", space)
        if Path("/run/netns", self._switch).exists():
            _ip("netns", "delete", self._switch)


@contextlib.contextmanager
def nodes(count: int, folder: Path) -> Iterator[Nodes]:
    """Build a network of so many nodes, and remove it with all that runs there.

    `folder` is where their programs run, and as good as a file system that they share. Skips the
    test where namespaces cannot be made.
    """
    made = Nodes(count, folder)
    require_namespaces()
    try:
        made._build()
        yield made
    finally:
        made._remove()


def require_namespaces() -> None:
    """Skip the test where this process may not make a namespace, and say why."""
    for program in ("ip", "unshare"):
        if shutil.which(program) is None:
            pytest.skip(f"network namespaces need {program} (Debian's iproute2 and util-linux)")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "true"], capture_output=True, text=True
    )
    if tried.returncode != 0:
        pytest.skip(f"no network namespace can be made here: {tried.stderr.strip()}")


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
