"""Whether a checkpoint's files are those that were saved. No torch in here."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from mcore_lab.checkpoint.manifest import MANIFEST, FileRecord, Manifest, files_in, read_manifest
from mcore_lab.checkpoint.manifest import record as record_of
from mcore_lab.errors import CheckpointError

_THREADS = 2
_SHOWN = 3


def require_same_files(folder: Path, found: list[str]) -> None:
    """Raise CheckpointError, in one line, with what `differences` has found in the folder."""
    if found:
        more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
        raise CheckpointError(
            f"cannot read the checkpoint {folder}: {'; '.join(found[:_SHOWN])}{more}"
        )


def differences(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Return, a line each, how the files in `folder` differ from those that were saved.

    Ranks share the work: each calls it for its own `part` of `parts`. Without a manifest there is
    nothing to hold the files against, and nothing is found. Raises CheckpointError if the manifest
    is damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return []
    # The largest first, so that every rank has about as much to read.
    names = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    with ThreadPoolExecutor(_THREADS) as pool:
        compared = list(pool.map(partial(_compared, folder, manifest), names[part::parts]))
    extra = sorted(files_in(folder).keys() - manifest.files.keys()) if part == 0 else []
    return [*filter(None, compared), *(f"{name} is not of this checkpoint" for name in extra)]


def _compared(folder: Path, manifest: Manifest, name: str) -> str | None:
    """Return how a file differs, or None. Its size is looked at first: that takes no reading."""
    saved = manifest.files[name]
    try:
        size = (folder / name).stat().st_size
        if size == saved.size and record_of(folder / name, saved.rank) == saved:
            return None
        origin = _origin(folder, name, size)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
    if origin:
        return f"{name} is {origin}"
    if size != saved.size:
        return f"{name} has {size:,} bytes in place of {saved.size:,}"
    return f"{name} is damaged: its SHA-256 is not that of what was saved"


def _origin(folder: Path, name: str, size: int) -> str | None:
    """Return of which save beside this one a file is, if of any."""
    likely = [found for found in _saved_beside(folder) if found[2].size == size]
    if likely:
        digest = record_of(folder / name, 0).sha256
        for other, file, saved in likely:
            if saved.sha256 == digest:
                return f"{file} of another save, {other.name}"
    return None


def _saved_beside(folder: Path) -> Iterator[tuple[Path, str, FileRecord]]:
    here = folder.resolve()
    for other in sorted(path.parent for path in here.parent.glob(f"*/{MANIFEST}")):
        try:
            manifest = read_manifest(other) if other != here else None
        except CheckpointError:
            continue
        for file, saved in manifest.files.items() if manifest else ():
            yield other, file, saved
