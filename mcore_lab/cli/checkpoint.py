"""`mcore-lab checkpoint`: what can be done with a checkpoint without training."""

from __future__ import annotations

from collections.abc import Sequence

from mcore_lab.cli import reshard
from mcore_lab.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Run the command that comes first, and return its exit status."""
    if argv[:1] != ["reshard"]:
        raise ConfigError("mcore-lab checkpoint has one command: reshard SRC DST")
    return reshard.main(argv[1:])
