"""The checkout of Megatron-LM that `MEGATRON_LM` names, for tests that run what is in it."""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from pathlib import Path

import pytest


def megatron_lm() -> Path:
    """Return the checkout, if it is of the installed release; otherwise skip the test."""
    if "MEGATRON_LM" not in os.environ:
        pytest.skip("MEGATRON_LM names no checkout of Megatron-LM")
    checkout = Path(os.environ["MEGATRON_LM"])
    info = (checkout / "megatron" / "core" / "package_info.py").read_text()
    release = ".".join(re.findall(r"^(?:MAJOR|MINOR) = (\d+)", info, re.MULTILINE))
    installed = version("megatron-core")
    if not installed.startswith(f"{release}."):
        pytest.skip(f"MEGATRON_LM is of release {release}, and megatron-core {installed}")
    return checkout


def python_path(checkout: Path) -> str:
    """Return a PYTHONPATH on which the checkout's own packages come first."""
    return os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])
