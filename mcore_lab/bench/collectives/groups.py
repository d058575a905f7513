"""The kinds of groups that a layout communicates in: those of more than one rank. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mcore_lab.errors import LayoutError
from mcore_lab.layout import ParallelLayout

KINDS = (
    *("tp", "cp", "pp", "dp", "ep", "etp", "edp"),
    *("dp-cp", "tp-cp", "tp-pp", "tp-dp", "tp-dp-cp", "etp-ep", "etp-ep-pp"),
    "embedding",
)
"""What `initialize_model_parallel` builds groups of, in the words of `ParallelLayout.groups`."""
WORLD = "world"
"""The kind of the one group that every rank is in."""


@dataclass(frozen=True, kw_only=True)
class GroupKind:
    """Groups that communicate at the same time, each among its own ranks."""

    name: str
    groups: tuple[tuple[int, ...], ...]
    """The ranks of each, all of one size; a rank is in one of them at most."""
    also: tuple[str, ...] = ()
    """Other kinds with these very groups."""

    @property
    def ranks(self) -> int:
        """How many ranks a group has."""
        return len(self.groups[0])


def world_kind(world_size: int) -> GroupKind:
    """Return the kind of one group of all ranks."""
    return GroupKind(name=WORLD, groups=(tuple(range(world_size)),))


def kinds_of(layout: ParallelLayout, world_size: int, names: Sequence[str] = ()) -> list[GroupKind]:
    """Return the layout's kinds of groups of more than one rank, or those of these names.

    Kinds that have the same groups are one. Raises LayoutError where the layout does not fit the
    ranks, and for a name that no groups of more than one rank have.
    """
    layout.require_world(world_size)
    found: dict[tuple[tuple[int, ...], ...], list[str]] = {}
    for name in names or KINDS:
        groups = _groups(layout, world_size, name)
        if len(groups[0]) > 1:
            found.setdefault(groups, []).append(name)
        elif names:
            raise LayoutError(
                f"each {name} group of this layout on {world_size} ranks is one rank, which has "
                f"nobody to exchange with; {_larger(layout, world_size)} are larger"
            )
    return [
        GroupKind(name=first, groups=groups, also=tuple(others))
        for groups, (first, *others) in found.items()
    ]


def _groups(layout: ParallelLayout, world_size: int, name: str) -> tuple[tuple[int, ...], ...]:
    if name == WORLD:
        return world_kind(world_size).groups
    return tuple(sorted(layout.groups(name, world_size)))


def _larger(layout: ParallelLayout, world_size: int) -> str:
    kinds = kinds_of(layout, world_size)
    return ", ".join(name for kind in kinds for name in (kind.name, *kind.also))
