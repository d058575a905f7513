"""Megatron-Core's parallelism, made something that anyone can run, prove and plan.

Importing this package imports neither torch nor Megatron-Core.
"""

from __future__ import annotations


def __getattr__(name: str) -> str:
    # Reading the version takes longer than all the rest of a command's start-up.
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("mcore-lab")
        except PackageNotFoundError:
            return "0+not.installed"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
