"""Whether a checkpoint may be loaded at all: if it is whole, and if it is harmless."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist

from mcore_lab.checkpoint.contents import Contents, contents_of
from mcore_lab.checkpoint.integrity import differences, require_same_files
from mcore_lab.checkpoint.manifest import MANIFEST
from mcore_lab.runtime.together import fail_together, on_any_rank

_LOGGER = logging.getLogger(__name__)


def admit(path: Path, *, verify: bool) -> Contents:
    """Return what the checkpoint at `path` holds.

    Raises CheckpointError, on every rank, if it is not to be loaded.

    With `verify` the ranks share the hashing of its files; those of a checkpoint without a
    manifest, as Megatron-LM saves it, are taken as they are. Each rank looks itself at what the
    checkpoint would have it import, as it may lie on a disk of its own.
    """
    if verify:
        _require_whole(path)
    with fail_together():
        return contents_of(path)


def _require_whole(path: Path) -> None:
    if not (path / MANIFEST).exists():
        _LOGGER.warning("%s has no %s: its files are taken as they are", path, MANIFEST)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found: list[str] = []
    with fail_together():
        found = differences(path, rank, ranks)
    if on_any_rank(bool(found)):
        of_ranks: list[list[str]] = [[]] * ranks
        dist.all_gather_object(of_ranks, found)
        require_same_files(path, [line for one in of_ranks for line in one])
