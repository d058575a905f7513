"""`pytest -p mcore_lab.cpu.pytest_plugin`: tests that are written for CUDA and NCCL run on CPU.

Under torchrun each rank is a pytest of its own:

    torchrun --nproc-per-node 2 -m pytest -p mcore_lab.cpu.pytest_plugin tests/unit_tests/FILE

No test is skipped here: what only a GPU can do fails, and says why.
"""

from __future__ import annotations

import pytest

from mcore_lab import cpu


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Enable the layer in pytest's own thread, before any conftest or test file is imported."""
    cpu.enable()
