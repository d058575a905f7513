"""The ledger of patches: each is needed by what is installed, and none is without a proof of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ledger_probes import PROBES

from mcore_lab.cpu.ledger import LEDGER, Patch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="upstream needs no patch on CUDA")


@pytest.fixture(scope="module")
def needed() -> dict[str, bool | str]:
    """What the probes say of the installed torch and Megatron-Core, from a fresh process."""
    program = Path(__file__).with_name("ledger_probes.py")
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, bool | str] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_every_entry_has_a_probe_and_every_probe_an_entry() -> None:
    assert [patch.replaces for patch in LEDGER] == list(PROBES)


@pytest.mark.parametrize("patch", LEDGER, ids=lambda patch: patch.replaces)
def test_upstream_needs_exactly_the_entries_meant_for_it(
    patch: Patch, needed: dict[str, bool | str]
) -> None:
    assert needed[patch.replaces] is patch.is_for_this
