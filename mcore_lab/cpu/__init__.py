"""Megatron-Core without a GPU.

`enable()` lets code that is written for CUDA and NCCL run on CPU and Gloo, in this process and in
those that it forks. `torchrun … -m mcore_lab.cpu SCRIPT [args]` does the same for a script that
knows nothing of it.
"""

from __future__ import annotations

import logging
import warnings

__all__ = ["enable", "is_enabled", "preload"]

_enabled = False


def enable() -> None:
    """Let this process, and those it forks, run Megatron-Core on CPU.

    Imports torch and Megatron-Core. Megatron-Core may have been imported before; calling this
    again changes nothing.
    """
    global _enabled
    if _enabled:
        return
    from mcore_lab.cpu.ledger import apply_all

    apply_all()
    _enabled = True


def preload() -> None:
    """Import Megatron-Core so that forked processes need not; changes nothing of torch.

    Each of them calls `enable()` for itself, which takes milliseconds then. What the imports warn
    of (optional libraries that are not there) is nothing that a person at a terminal can act on.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        from mcore_lab.cpu.megatron_core import import_without_torch_compile

        import_without_torch_compile()


def is_enabled() -> bool:
    """Say whether `enable()` has been called in this process or in the one that forked it."""
    return _enabled
