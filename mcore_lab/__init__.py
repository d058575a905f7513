"""Megatron-Core's parallelism, made something that anyone can run, prove and plan.

Importing this package imports neither torch nor Megatron-Core.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcore_lab.notebook import launch

    __version__: str

__all__ = ["__version__", "launch"]


def __getattr__(name: str) -> Any:
    if name == "launch":
        from mcore_lab.notebook import launch

        return launch
    # Reading the version takes longer than all the rest of a command's start-up.
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("mcore-lab")
        except PackageNotFoundError:
            return "0+not.installed"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
