"""Tests fork their ranks from this process: few threads, no words on libraries not installed."""

from __future__ import annotations

import os

import pytest

# Read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_OF_NO_USE = (
    r".*(Apex|Transformer Engine|transformer_engine|flash|grouped_gemm).*",
    r".*use of fork\(\) may lead to deadlocks.*",
)


def pytest_configure(config: pytest.Config) -> None:
    for message in _OF_NO_USE:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")
