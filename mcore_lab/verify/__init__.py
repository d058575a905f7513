"""Whether a layout computes what one rank computes.

`verify(recipe, layout, nproc)` runs both and returns a `VerificationReport`. Imported when they are
asked for: `comparable` and `layouts` answer without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcore_lab.verify.report import VerificationReport
    from mcore_lab.verify.run import Reference, verify

__all__ = ["Reference", "VerificationReport", "verify"]


def __getattr__(name: str) -> Any:
    import importlib

    modules = {"verify": "run", "Reference": "run", "VerificationReport": "report"}
    if name not in modules:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from mcore_lab import cpu
    from mcore_lab.runtime import choose_device

    if choose_device(1).type == "cpu":
        # Before all that imports Megatron-Core: it is done without its warnings and torch.compile.
        cpu.preload()
    return getattr(importlib.import_module(f"{__name__}.{modules[name]}"), name)
