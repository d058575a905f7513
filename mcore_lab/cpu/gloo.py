"""`torch.distributed` over Gloo where a program asks for NCCL, and what Gloo lacks."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mcore_lab.cpu.replace import replace


def _replace(name: str, wrapper: Callable[..., Any]) -> None:
    """Put `wrapper` in the place of a public function, in both modules that offer it."""
    for module in (dist, dist.distributed_c10d):
        if hasattr(module, name):
            replace(module, name, wrapper)


def _gloo_for(backend: object) -> object:
    return "gloo" if isinstance(backend, str) and "nccl" in backend.lower() else backend


def gloo_for_nccl() -> None:
    """`init_process_group("nccl")` and `new_group(backend="nccl")` make Gloo groups."""
    init, new_group = dist.init_process_group, dist.new_group

    @functools.wraps(init)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        for cuda_only in ("device_id", "pg_options"):
            kwargs.pop(cuda_only, None)
        init(_gloo_for(backend or "gloo"), *args, **kwargs)

    @functools.wraps(new_group)
    def new_gloo_group(*args: Any, **kwargs: Any) -> Any:
        kwargs["backend"] = _gloo_for(kwargs.get("backend"))
        for cuda_only in ("device_id", "pg_options"):
            kwargs.pop(cuda_only, None)
        return new_group(*args, **kwargs)

    _replace("init_process_group", init_process_group)
    atexit.register(_destroy_left_groups)
    _replace("new_group", new_gloo_group)


def _destroy_left_groups() -> None:
    """Gloo's threads have to end before the interpreter does; scripts for NCCL seldom see to it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier_without_devices() -> None:
    """`barrier(device_ids=[…])` names CUDA devices, which Gloo refuses."""
    barrier = dist.barrier

    @functools.wraps(barrier)
    def barrier_on_cpu(
        group: Any = None, async_op: bool = False, device_ids: object = None, **kwargs: Any
    ) -> Any:
        return barrier(group=group, async_op=async_op, **kwargs)

    _replace("barrier", barrier_on_cpu)


def flat_all_gather_into_tensor() -> None:
    """Gloo takes the concatenated output shape only; NCCL takes the stacked one as well."""
    gather = dist.all_gather_into_tensor

    @functools.wraps(gather)
    def all_gather_into_tensor(
        output_tensor: torch.Tensor, input_tensor: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if output_tensor.is_contiguous() and input_tensor.is_contiguous():
            output_tensor, input_tensor = output_tensor.view(-1), input_tensor.view(-1)
        return gather(output_tensor, input_tensor, *args, **kwargs)

    _replace("all_gather_into_tensor", all_gather_into_tensor)
    _replace("_all_gather_base", all_gather_into_tensor)


def uneven_all_gather() -> None:
    """Gloo's `all_gather` wants one size; NCCL takes a size per rank (expert tensor parallelism).

    Each rank's tensor is broadcast in turn, which moves the same bytes.
    """
    gather = dist.all_gather

    @functools.wraps(gather)
    def all_gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if len({t.shape for t in tensor_list}) <= 1:
            return gather(tensor_list, tensor, group=group, async_op=async_op)
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        me = dist.get_rank()
        works = []
        for rank, output in zip(ranks, tensor_list, strict=True):
            if rank == me:
                output.copy_(tensor)
            works.append(dist.broadcast(output, src=rank, group=group, async_op=True))
        return _wait_for_all(works, async_op)

    _replace("all_gather", all_gather)


class _Works:
    """Several operations that end together."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self, *args: Any) -> bool:
        return all([work.wait(*args) for work in self._works])

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


def _wait_for_all(works: list[Any], async_op: bool) -> _Works | None:
    joined = _Works(works)
    if async_op:
        return joined
    joined.wait()
    return None
