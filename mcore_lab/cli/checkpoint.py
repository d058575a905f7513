"""`mcore-lab checkpoint`: look at checkpoints, see that they are whole, and remove old ones."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mcore_lab.checkpoint.contents import parameters_by_layer, stored_files, tensors_of
from mcore_lab.checkpoint.folders import (
    checkpoints_folder,
    latest_checkpoint,
    require_checkpoint,
    whole_checkpoints,
)
from mcore_lab.checkpoint.integrity import differences
from mcore_lab.checkpoint.manifest import MANIFEST, files_in, read_manifest
from mcore_lab.checkpoint.publication import prune
from mcore_lab.checkpoint.trust import read_metadata
from mcore_lab.cli import export, importing, reshard
from mcore_lab.cli.arguments import Parser
from mcore_lab.errors import CheckpointError, ConfigError
from mcore_lab.report.tables import print_json, print_table

_SIZES = ("tp", "cp", "pp", "vpp", "dp", "ep", "etp")
_PATH = "a checkpoint, or a run's folder for its latest"
_MODULES = {
    "reshard": (reshard.main, "write a checkpoint as another layout would have"),
    "export": (export.main, "write a checkpoint's weights as safetensors"),
    "import": (importing.main, "make a checkpoint of weights in safetensors files"),
}
"""Commands that have modules of their own; the options of some are those of a recipe."""


def main(argv: Sequence[str]) -> int:
    """Look at checkpoints, see that they are whole, remove old ones, write them for others."""
    if argv and argv[0] in _MODULES:
        return _MODULES[argv[0]][0](argv[1:])
    options = _parser().parse_args(argv or ["--help"])
    status: int = options.function(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mcore-lab checkpoint", description=main.__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(function: Callable[[argparse.Namespace], int], *paths: str) -> argparse.ArgumentParser:
        name, what = function.__name__.strip("_"), function.__doc__ or ""
        command = commands.add_parser(name, help=what.rstrip(".").lower(), description=what)
        for path in paths:
            what = "a run's folder" if path == "RUN" else _PATH
            command.add_argument(path.lower(), metavar=path, type=Path, help=what)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(function=function)
        return command

    add(_show, "PATH")
    add(_list, "RUN")
    add(_verify, "PATH")
    add(_diff, "A", "B")
    keep = add(_prune, "RUN")
    keep.add_argument("--keep", type=int, required=True, help="how many checkpoints stay")
    for name, (_, what) in _MODULES.items():
        commands.add_parser(name, help=what)
    return parser


def _show(options: argparse.Namespace) -> int:
    """Show a checkpoint: its step, layout and versions, parameters by layer, who wrote what."""
    folder = require_checkpoint(options.path)
    summary = _summary(folder)
    tensors = tensors_of(folder)
    layers = parameters_by_layer(tensors)
    files = stored_files(folder)
    names = ("parameters", "bytes", "optimizer_bytes")
    if options.json:
        of_layers = {layer: dict(zip(names, row, strict=True)) for layer, row in layers.items()}
        listed = {t.name: {"shape": t.shape, "dtype": t.dtype} for t in tensors.values()}
        parts = {"layers": of_layers, "tensors": listed, "files": [asdict(file) for file in files]}
        print_json(summary | parts)
        return 0
    print_table(("checkpoint", str(folder)), [(k, _in_words(v)) for k, v in summary.items()][1:])
    total = ("in all", *(f"{sum(column):,}" for column in zip(*layers.values(), strict=True)))
    rows = [(layer, *(f"{count:,}" for count in row)) for layer, row in layers.items()]
    print()
    print_table(("layer", "parameters", "bytes", "optimizer's bytes"), [*rows, total])
    print()
    written = [(file.name, file.rank, f"{file.size:,}", file.items or "") for file in files]
    print_table(("file", "written by rank", "bytes", "items"), written)
    return 0


def _list(options: argparse.Namespace) -> int:
    """List the checkpoints of a run."""
    folder = checkpoints_folder(options.run)
    latest = latest_checkpoint(folder)
    found = [
        _summary(path) | {"latest": path == latest} for path in whole_checkpoints(folder).values()
    ]
    if options.json:
        print_json(found)
        return 0
    rows = [
        (
            one["step"],
            "latest" if one["latest"] else "",
            f"{one['bytes']:,}",
            _in_words(one["layout"]),
            Path(one["checkpoint"]).name,
        )
        for one in found
    ]
    print_table(("step", "", "bytes", "layout", "folder"), rows)
    return 0


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


def _diff(options: argparse.Namespace) -> int:
    """Say how far two checkpoints are apart, tensor by tensor, whatever their layouts."""
    one, other = require_checkpoint(options.a), require_checkpoint(options.b)
    from mcore_lab.checkpoint.difference import compared

    found = list(compared(one, other))
    apart = [tensor for tensor in found if tensor.differs]
    if options.json:
        listed = [asdict(tensor) for tensor in found]
        print_json({"a": str(one), "b": str(other), "same": not apart, "tensors": listed})
        return 1 if apart else 0
    if apart:
        rows = [(t.name, _number(t.largest), _number(t.relative), t.remark) for t in apart]
        print_table(("tensor", "largest difference", "relative", ""), rows)
    print(f"{len(found) - len(apart)} of {len(found)} tensors are the same, bit for bit")
    return 1 if apart else 0


def _prune(options: argparse.Namespace) -> int:
    """Remove the oldest checkpoints of a run."""
    if options.keep < 1:
        raise ConfigError(f"--keep expects 1 or more; got {options.keep}")
    folder = checkpoints_folder(options.run)
    latest = latest_checkpoint(folder)
    steps = {path: step for step, path in whole_checkpoints(folder).items()}
    removed = prune(folder, options.keep, latest=steps[latest] if latest else None)
    if options.json:
        kept = [str(path) for path in whole_checkpoints(folder).values()]
        print_json({"removed": [str(path) for path in removed], "kept": kept})
    else:
        print("\n".join(f"removed {path}" for path in removed) or "removed nothing")
    return 0


def _summary(folder: Path) -> dict[str, Any]:
    """Return what is known of a checkpoint; one without a manifest does not say much of itself."""
    manifest = read_manifest(folder)
    size = sum(path.stat().st_size for path in files_in(folder).values())
    return {
        "checkpoint": str(folder),
        "step": manifest.step if manifest else None,
        "ranks": manifest.world_size if manifest else None,
        "layout": {k: manifest.layout[k] for k in _SIZES if k in manifest.layout}
        if manifest
        else {},
        "versions": dict(manifest.versions) if manifest else {},
        "bytes": size,
    }


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items()) or f"no {MANIFEST}"
    if value is None:
        return f"no {MANIFEST}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
