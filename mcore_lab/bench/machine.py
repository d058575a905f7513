"""What a benchmark ran on: figures of two machines, or of two versions, are not each other's."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from mcore_lab.version import installed_version

_GIB = 2**30
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine, and what was installed on it, at the start of a benchmark."""

    date: str
    """UTC, ISO 8601."""
    load_average: float
    """Processes that ran or waited for a core, over the minute before."""
    cpu: str
    cores: float
    """What this process may use of them: its affinity, or less where its control group has a
    quota."""
    memory_bytes: int
    """Of the machine, or less where the control group has a limit."""
    gpus: tuple[str, ...]
    """By name; empty where there is no NVIDIA driver."""
    system: str
    python: str
    torch: str
    megatron_core: str
    mcore_lab: str

    def lines(self, threads_per_rank: int | None = None) -> tuple[str, str]:
        """Return it for a person, in two lines."""
        cores = f"{self.cores:g} core{'' if self.cores == 1 else 's'} of {self.cpu}"
        gpus = ", ".join(self.gpus) or "no GPU"
        hardware = [cores, f"{self.memory_bytes / _GIB:.1f} GiB", gpus]
        if threads_per_rank is not None:
            threads = "1 thread" if threads_per_rank == 1 else f"{threads_per_rank} threads"
            hardware.append(f"{threads} a rank")
        hardware += [f"load {self.load_average:.2f} before", self.date]
        software = [
            self.system,
            f"Python {self.python}",
            f"torch {self.torch}",
            f"Megatron-Core {self.megatron_core}",
            f"mcore_lab {self.mcore_lab}",
        ]
        return f"on {', '.join(hardware)}", ", ".join(software)


def this_machine() -> Machine:
    """Return what this process runs on. Imports no torch, and starts no CUDA."""
    return Machine(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        load_average=round(os.getloadavg()[0], 2),
        cpu=_cpu(),
        cores=usable_cores(),
        memory_bytes=usable_memory(),
        gpus=tuple(_gpus()),
        system=_system(),
        python=platform.python_version(),
        torch=version("torch"),
        megatron_core=version("megatron-core"),
        mcore_lab=installed_version(),
    )


def usable_cores(cgroups: Path = _CGROUPS) -> float:
    """Return how many cores' time this process may use."""
    cores: float = len(os.sched_getaffinity(0))
    for folder in _own_groups("cpu", cgroups):
        with suppress(OSError, ValueError):  # "max" is no number: no quota
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            cores = min(cores, quota / period)
        with suppress(OSError):
            quota = int((folder / "cpu.cfs_quota_us").read_text())
            period = int((folder / "cpu.cfs_period_us").read_text())
            if quota > 0:
                cores = min(cores, quota / period)
    return cores


def usable_memory(cgroups: Path = _CGROUPS) -> int:
    """Return how many bytes of memory this process and its neighbours may use."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _own_groups("memory", cgroups):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):
                memory = min(memory, int((folder / name).read_text()))
    return memory


def _own_groups(controller: str, cgroups: Path) -> Iterator[Path]:
    """Yield the folders of this process's control group and of those that it is in.

    Version 2 has one tree, version 1 one a controller. A container sees its own group as the root,
    whatever the path that it reads.
    """
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = cgroups / controllers if controllers else cgroups
            own = root / path.lstrip("/")
            yield own
            yield from (folder for folder in own.parents if folder.is_relative_to(root))


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return " ".join(value.split())
    return platform.processor() or platform.machine()


def _gpus() -> Iterator[str]:
    # The driver's own list: asking torch for names would start CUDA, and no rank be forked then.
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with suppress(OSError):
            for line in file.read_text().splitlines():
                name, _, value = line.partition(":")
                if name == "Model":
                    yield value.strip()


def _system() -> str:
    name = ""
    with suppress(OSError):
        name = f"{platform.freedesktop_os_release().get('PRETTY_NAME', '')}, "
    return f"{name}{platform.system()} {platform.release()} {platform.machine()}"
