"""The version of this package, which `pyproject.toml` alone says."""

from __future__ import annotations


def installed_version() -> str:
    """Return the version that is installed; `0+not.installed` where only the sources are there."""
    # Reading it takes longer than all the rest of a command's start-up.
    from importlib import metadata

    try:
        return metadata.version("mcore-lab")
    except metadata.PackageNotFoundError:
        return "0+not.installed"
