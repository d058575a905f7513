"""`mcore-lab checkpoint`: look at checkpoints, and see that they are whole. Reads no tensor."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from mcore_lab.checkpoint.folders import require_checkpoint
from mcore_lab.checkpoint.integrity import differences
from mcore_lab.checkpoint.manifest import MANIFEST, read_manifest
from mcore_lab.checkpoint.trust import read_metadata
from mcore_lab.cli.arguments import Parser
from mcore_lab.errors import CheckpointError
from mcore_lab.report.tables import print_json

_PATH = "a checkpoint, or a run's folder for its latest"


def main(argv: Sequence[str]) -> int:
    """Look at checkpoints, see that they are whole, and remove old ones."""
    options = _parser().parse_args(argv or ["--help"])
    status: int = options.function(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mcore-lab checkpoint", description=main.__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        what = function.__doc__ or ""
        command = commands.add_parser(name, help=what.rstrip(".").lower(), description=what)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(function=function)
        return command

    add("verify", _verify).add_argument("path", metavar="PATH", type=Path, help=_PATH)
    return parser


def _verify(options: argparse.Namespace) -> int:
    """Hold every file against the hash that it was saved with, and see that it is harmless."""
    path: Path = options.path
    # What is damaged may be what a checkpoint is known by.
    folder = path if (path / MANIFEST).exists() else require_checkpoint(path)
    manifest = read_manifest(folder)
    if manifest is None:
        raise CheckpointError(
            f"the checkpoint {folder} has no {MANIFEST} to hold its files against"
        )
    found = differences(folder)
    if not found:
        read_metadata(folder)
    size = sum(file.size for file in manifest.files.values())
    if options.json:
        counts = {"files": len(manifest.files), "bytes": size}
        print_json({"checkpoint": str(folder), "ok": not found, **counts, "differences": found})
    elif found:
        print(f"{folder} is not as it was saved:", *found, sep="\n  ")
    else:
        print(f"{folder}: {len(manifest.files)} files, {size:,} bytes, all as they were saved")
    return 1 if found else 0
