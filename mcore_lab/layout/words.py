"""A layout as a person writes it: `tp2 sp dp4`."""

from __future__ import annotations

from collections.abc import Mapping

from mcore_lab.layout.parallel import ParallelLayout


def sizes_in_use(layout: ParallelLayout, world_size: int) -> dict[str, int | bool]:
    """Return what a layout splits, by short names: sizes above 1, and what is switched on."""
    sizes = {name: getattr(layout, name) for name in ("tp", "cp", "pp", "vpp", "ep")}
    sizes["dp"] = layout.data_parallel_size(world_size)
    split: dict[str, int | bool] = {name: size for name, size in sizes.items() if size > 1}
    if layout.etp != layout.tp:
        split["etp"] = layout.etp
    flags = {"sp": layout.sp, "distopt": layout.use_distributed_optimizer}
    return split | {name: True for name, on in flags.items() if on}


def in_words(sizes: Mapping[str, int | bool]) -> str:
    """Return what a layout splits as a person writes it: `tp2 sp dp4`."""
    return " ".join(name if size is True else f"{name}{size}" for name, size in sizes.items())
