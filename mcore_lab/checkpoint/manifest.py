"""`manifest.json`: what a checkpoint's folder holds, and a hash of every file. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mcore_lab.errors import CheckpointError

MANIFEST = "manifest.json"
_FORMAT = 1
_OWN_HASH = "manifest_sha256"


@dataclass(frozen=True)
class FileRecord:
    """A file of a checkpoint as it was written."""

    size: int
    """In bytes."""
    sha256: str
    """In hexadecimal digits."""
    rank: int
    """The rank that wrote it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A checkpoint as it was saved."""

    step: int
    world_size: int
    layout: Mapping[str, int]
    """Sizes of the layout that it was saved from: `tp`, `cp`, `pp`, …"""
    versions: Mapping[str, str]
    """Of this project, Megatron-Core, torch and Python."""
    files: Mapping[str, FileRecord]
    """By their paths in the folder; the manifest itself is not among them."""

    def render(self) -> bytes:
        """Return the only bytes that say this: every other is damage, in the manifest's own too."""
        content = {"format": _FORMAT, **asdict(self)}
        return _text(content | {_OWN_HASH: hashlib.sha256(_text(content)).hexdigest()})


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of the checkpoint in `folder`, or None where it was saved without.

    Raises CheckpointError if it is damaged.
    """
    try:
        raw = (folder / MANIFEST).read_bytes()
        manifest = _parsed(json.loads(raw))
        if manifest.render() == raw:
            return manifest
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    raise CheckpointError(f"cannot read the checkpoint {folder}: {MANIFEST} is damaged")


def files_in(folder: Path) -> dict[str, Path]:
    """Return the files that a manifest is to name, by their paths in the folder."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if _is_file(path)}
    found.pop(MANIFEST, None)
    return found


def record(file: Path, rank: int) -> FileRecord:
    """Return the record of a file that is there."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return FileRecord(stream.tell(), digest, rank)


def _is_file(path: Path) -> bool:
    return path.is_symlink() or not path.is_dir()


def _parsed(content: dict[str, Any]) -> Manifest:
    files = {name: FileRecord(**values) for name, values in content["files"].items()}
    named = {name: content[name] for name in ("step", "world_size", "layout", "versions")}
    return Manifest(**named, files=files)


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
