"""What `bench launch` starts: ranks that meet, all-reduce once, and leave the time of that."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

STARTED = "started"
"""The file with the time from which a way is measured, where that is not the start of its command;
beside it each rank leaves one with its number as the name. All times are of the system's monotonic
clock, which is the same for all processes."""


def main(way: str, nproc: int, folder: Path) -> None:
    """Start `nproc` ranks in this way, or be one of those that torchrun has started."""
    if way == "torchrun":
        stand(folder)
    elif way == "spawn":
        from torch.multiprocessing.spawn import spawn

        from mcore_lab.runtime.ports import free_port

        spawn(_spawned, (nproc, free_port(), folder), nproc)
    else:
        from mcore_lab import cpu
        from mcore_lab.runtime import choose_device, launch

        device = choose_device(nproc).type
        if way == "launch()":
            # As a program has them that launches ranks a second time.
            cpu.preload()
            leave_time(folder / STARTED)
        launch(stand, nproc, folder, device=device)


def stand(folder: Path) -> None:
    """Join the process group as a recipe does, and leave the time when the first sum is there."""
    import torch
    import torch.distributed as dist

    from mcore_lab.runtime import RankLog, process_group

    with RankLog(int(os.environ["RANK"])), process_group() as world:
        ranks = torch.ones((), device=world.device.type)
        dist.all_reduce(ranks)
        assert int(ranks) == world.size  # a number on the CPU: the device has come as far
        leave_time(folder / str(world.rank))


def leave_time(file: Path) -> None:
    """Write the time into a file."""
    file.write_text(repr(time.monotonic()))


def _spawned(rank: int, nproc: int, port: int, folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    stand(folder)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
