"""What this machine has for training: each library is imported and Gloo is used, not looked up."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_GIB = 2**30
_CUDA_BUILD = "install a CUDA build of torch: https://pytorch.org/get-started/locally"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked for."""

    name: str
    found: str = ""
    """Its version or amount, or why it does not work; empty if it is not there."""
    ok: bool
    """It is there and works."""
    needed: bool = False
    """Training on CPU does not work without it."""
    allows: str
    """What it is good for."""
    fix: str = ""
    """What adds it, where it is not there: a command if there is one."""

    @property
    def state(self) -> str:
        """Say in a word how it is: `ok`, `missing` or, if it can be spared, `absent`."""
        return "ok" if self.ok else "missing" if self.needed else "absent"


@dataclass(frozen=True, kw_only=True)
class Library:
    """A library that is tried by importing it."""

    name: str
    module: str
    distribution: str
    allows: str
    fix: str
    needed: bool = False
    versions: tuple[tuple[int, ...], tuple[int, ...]] = ((), (sys.maxsize,))
    """The first version that works, and the first that does not again."""


LIBRARIES = (
    Library(
        name="torch",
        module="torch",
        distribution="torch",
        allows="tensors and process groups",
        fix='pip install "torch>=2.6,<2.14"',
        needed=True,
        versions=((2, 6), (2, 14)),
    ),
    Library(
        name="Megatron-Core",
        module="megatron.core",
        distribution="megatron-core",
        allows="parallel models, optimizers and checkpoints",
        fix='pip install "megatron-core>=0.16.1,<0.20"',
        needed=True,
        versions=((0, 16, 1), (0, 20)),
    ),
    Library(
        name="einops",
        module="einops",
        distribution="einops",
        allows="Megatron-Core, which imports it",
        fix="pip install einops",
        needed=True,
    ),
    Library(
        name="psutil",
        module="psutil",
        distribution="psutil",
        allows="Megatron-Core's checkpoints, which use it",
        fix="pip install psutil",
        needed=True,
    ),
    Library(
        name="triton",
        module="triton",
        distribution="triton",
        allows="Megatron-Core from 0.17 on, which imports it",
        fix="pip install triton" if sys.version_info >= (3, 12) else "",
        needed=sys.version_info >= (3, 12),
    ),
    Library(
        name="Transformer Engine",
        module="transformer_engine.pytorch",
        distribution="transformer-engine",
        allows="on GPUs: fused layers, FP8, --model.backend te",
        fix='pip install "mcore-lab[te]"',
    ),
    Library(
        name="Apex",
        module="apex",
        distribution="apex",
        allows="on GPUs: fused optimizers without Transformer Engine",
        fix="pip install --no-build-isolation git+https://github.com/NVIDIA/apex",
    ),
)


def diagnose() -> list[Finding]:
    """Return what was found. Imports torch and Megatron-Core, which takes seconds."""
    with _silence():
        libraries = [_library(library) for library in LIBRARIES]
        return [_python(), *libraries, _gpus(), _gloo(), _nccl(), _cores(), _memory(), _shm()]


def _python() -> Finding:
    newer = sys.version_info >= (3, 12)
    return Finding(
        name="Python",
        found=platform.python_version(),
        ok=sys.version_info >= (3, 11),
        needed=True,
        allows="Megatron-Core 0.16.1 to 0.19" if newer else "Megatron-Core 0.16.1; 3.12: to 0.19",
        fix="install Python 3.12",
    )


def _library(library: Library) -> Finding:
    found, ok = "", False
    if importlib.util.find_spec(library.module.partition(".")[0]):
        try:
            importlib.import_module(library.module)
            found = _version(library)
            first, end = library.versions
            ok = first <= tuple(map(int, re.findall(r"\d+", found)[:3])) < end
        except Exception as error:  # what a broken library raises can be anything
            found = f"broken: {error}"
    return Finding(
        name=library.name,
        found=found,
        ok=ok,
        needed=library.needed,
        allows=library.allows,
        fix=library.fix,
    )


def _version(library: Library) -> str:
    version = importlib.metadata.version(library.distribution)
    if library.name != "torch":
        return version
    import torch

    cuda = torch.version.cuda
    return f"{version}, {f'build for CUDA {cuda}' if cuda else 'build for CPU'}"


def _gpus() -> Finding:
    names: list[str] = []
    with contextlib.suppress(ImportError, RuntimeError):
        import torch

        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    driver = Path("/proc/driver/nvidia/version").exists()
    return Finding(
        name="GPUs",
        found=", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)),
        ok=bool(names),
        allows="a rank on each, with NCCL; without, ranks are on CPU with Gloo",
        fix=_CUDA_BUILD if driver else "no NVIDIA driver here: a machine with a GPU",
    )


def _gloo() -> Finding:
    found, ok = "", False
    try:
        import torch
        from torch import distributed

        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        distributed.all_reduce(torch.ones(1))
        distributed.destroy_process_group()
        found, ok = "an all-reduce works", True
    except Exception as error:  # a network that Gloo cannot use shows as many kinds of error
        found = f"broken: {error}"
    return Finding(
        name="Gloo",
        found=found,
        ok=ok,
        needed=True,
        allows="process groups on CPU",
        fix="export GLOO_SOCKET_IFNAME=lo",
    )


def _nccl() -> Finding:
    found = ""
    with contextlib.suppress(ImportError, AttributeError):
        import torch

        if torch.distributed.is_nccl_available():
            found = ".".join(map(str, torch.cuda.nccl.version()))
    allows = "process groups on GPUs"
    return Finding(name="NCCL", found=found, ok=bool(found), allows=allows, fix=_CUDA_BUILD)


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0))
    return Finding(name="cores", found=str(cores), ok=True, allows="what ranks on CPU share")


def _memory() -> Finding:
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (page * os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    found = f"{total / _GIB:.1f} GiB, {free / _GIB:.1f} GiB free"
    return Finding(name="memory", found=found, ok=True, allows="what ranks on CPU share")


def _shm() -> Finding:
    total = free = 0
    with contextlib.suppress(OSError):
        total, _, free = shutil.disk_usage("/dev/shm")
    return Finding(
        name="/dev/shm",
        found=f"{total / _GIB:.1f} GiB, {free / _GIB:.1f} GiB free" if total else "",
        ok=free >= _GIB,
        allows="memory that processes share: NCCL's and data loaders'",
        fix="docker run --shm-size=8g",
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep back what libraries say of themselves while they are imported."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
