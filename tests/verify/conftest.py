"""What one rank computes, for each kind of model: run once, and many layouts held against it.

Megatron-Core is imported here first, as ranks that are forked from this process expect it.
"""

# ruff: noqa: E402
from __future__ import annotations

from mcore_lab import cpu

cpu.preload()

from collections.abc import Callable

import pytest
from planted import build, planted_forward_step
from verified_models import RECIPES

from mcore_lab.verify import Reference


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Return what gives the run of one rank of a model, by its name in `RECIPES`."""
    kept: dict[str, Reference] = {}

    def of(name: str) -> Reference:
        if name not in kept:
            folder, model = tmp_path_factory.mktemp(name), (build, planted_forward_step)
            kept[name] = Reference(RECIPES[name], folder, 2, *model, timeout=120)
        return kept[name]

    return of
