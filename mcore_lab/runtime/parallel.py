"""Process groups and Megatron-Core's model-parallel state, set up and torn down."""

from __future__ import annotations

import itertools
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from mcore_lab import cpu
from mcore_lab.layout import ParallelLayout
from mcore_lab.runtime.device import Device, choose_device, threads_per_rank
from mcore_lab.runtime.interface import choose_interface
from mcore_lab.runtime.ports import free_port
from mcore_lab.runtime.waiting import waited_in_vain

_LOGGER = logging.getLogger(__name__)
_joined = itertools.count()


@dataclass(frozen=True, kw_only=True)
class World:
    """This rank, among all of them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: Device
    timeout_seconds: float
    """How long this rank waits for others in one collective."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that talks to a person."""
        return self.rank == 0


@contextmanager
def process_group(
    *,
    ranks: int | None = None,
    device: str = "auto",
    timeout_seconds: float = 600,
    megatron_core: bool = True,
) -> Iterator[World]:
    """Join the process group that torchrun or `launch` describes; leave it at the end.

    Without either there is one rank. With `ranks` the first of them are in it, and no other comes
    here: of groups that follow each other, none is larger than the one before. On CPU
    `mcore_lab.cpu` is enabled first. The body calls `parallel_state.initialize_model_parallel`, or
    uses `model_parallel` in the place of this. Without `megatron_core` the body needs torch alone:
    Megatron-Core is not imported, and no patch is applied.

    A rank that waits longer than `timeout_seconds` for another in a collective, or whose connection
    to it is lost, raises LostPeerError with what it waited in; groups that the body makes have
    limits of their own.
    """
    _describe_one_rank_if_alone()
    size = ranks or int(os.environ["WORLD_SIZE"])
    local_size = min(size, int(os.environ["LOCAL_WORLD_SIZE"]))
    world = World(
        rank=int(os.environ["RANK"]),
        size=size,
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_size=local_size,
        device=choose_device(local_size, device),
        timeout_seconds=timeout_seconds,
    )
    if world.device.type == "cpu":
        torch.set_num_threads(threads_per_rank(local_size))
        if megatron_core:
            cpu.enable()
    else:
        torch.cuda.set_device(world.local_rank)
    if world.size > world.local_size and world.device.communication == "gloo":
        choose_interface(os.environ["MASTER_ADDR"])
    try:
        _join(world)
        yield world
    except BaseException as error:
        # Among others, a rank that fails leaves its group by ending: leaving it here would wait for
        # them under NCCL, and let them fail before this one has said why under Gloo.
        if world.size == 1:
            _leave()
        if told := waited_in_vain(error, world.rank, timeout_seconds):
            _LOGGER.error(told, exc_info=error)
            raise told from error
        raise
    _leave()


@contextmanager
def model_parallel(
    layout: ParallelLayout, *, seed: int = 1234, device: str = "auto"
) -> Iterator[World]:
    """Join the process group and build the layout's groups in it, seeded as Megatron-Core does.

    Raises LayoutError where the world size does not fit the layout, before anyone is joined.
    """
    _describe_one_rank_if_alone()
    world_size = int(os.environ["WORLD_SIZE"])
    layout.data_parallel_size(world_size)
    layout.expert_data_parallel_size(world_size)
    with process_group(device=device) as world:
        from megatron.core import parallel_state, tensor_parallel

        parallel_state.initialize_model_parallel(
            **layout.model_parallel_sizes(), distributed_timeout_minutes=world.timeout_seconds / 60
        )
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        yield world


def _join(world: World) -> None:
    timeout = timedelta(seconds=world.timeout_seconds)
    store, rank, size = next(dist.rendezvous("env://", world.rank, world.size, timeout=timeout))
    # torchrun's store outlives a group, and all ranks when they are started again: the next group
    # would find the addresses of the last.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        world.device.communication,
        store=dist.PrefixStore(f"attempt-{attempt}/process_group-{next(_joined)}", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
    )


def agreed_on(what: str, proposal: str) -> str:
    """Return the first proposal that a rank of this launch has made: the same for all of them.

    And for those that torchrun starts in their place: it is kept in torchrun's own store.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
    agreed: bytes = store.compare_set(f"mcore_lab/{what}", "", proposal)
    return agreed.decode()


def _leave() -> None:
    # Who has not imported it has no state in it, and need not wait for the import.
    if parallel_state := sys.modules.get("megatron.core.parallel_state"):
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _describe_one_rank_if_alone() -> None:
    """Set the environment that torchrun would, for a program that was started without it."""
    if "RANK" in os.environ:
        return
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
