"""`torch.distributed` over Gloo where a program asks for NCCL, and what Gloo lacks."""

from __future__ import annotations

import atexit
import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from mcore_lab.cpu.replace import replace


def _replace(name: str, wrapper: Callable[..., Any]) -> None:
    """Put `wrapper` in the place of a public function, in both modules that offer it."""
    for module in (dist, dist.distributed_c10d):
        if hasattr(module, name):
            replace(module, name, wrapper)


def gloo_for_nccl() -> None:
    """`init_process_group("nccl")` and `new_group(backend="nccl")` make Gloo groups."""
    _replace("init_process_group", _with_gloo(dist.init_process_group, default="gloo"))
    _replace("new_group", _with_gloo(dist.new_group, default=None))
    atexit.register(_destroy_left_groups)


def _with_gloo(make: Callable[..., Any], default: str | None) -> Callable[..., Any]:
    signature = inspect.signature(make)

    @functools.wraps(make)
    def make_with_gloo(*args: Any, **kwargs: Any) -> Any:
        wanted = signature.bind(*args, **kwargs).arguments
        backend = wanted.get("backend") or default
        wanted["backend"] = "gloo" if backend and "nccl" in backend.lower() else backend
        # They name a CUDA device and NCCL's settings.
        wanted.pop("device_id", None)
        wanted.pop("pg_options", None)
        return make(**wanted)

    return make_with_gloo


def _destroy_left_groups() -> None:
    """Gloo's threads have to end before the interpreter does; scripts for NCCL seldom see to it."""
    if dist.is_initialized():
        dist.destroy_process_group()


class _NcclOptions:
    """Settings of a communicator: taken, and of no effect."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.config = SimpleNamespace()


def name_nccl_options() -> None:
    """`ProcessGroupNCCL.Options` is not there in a CPU build of torch."""
    stand_in = SimpleNamespace(Options=_NcclOptions)
    for module in (dist, dist.distributed_c10d):
        module.ProcessGroupNCCL = stand_in  # type: ignore[attr-defined]


def flat_all_gather_into_tensor() -> None:
    """Gloo takes the concatenated output shape only; NCCL takes the stacked one as well."""
    _flatten("all_gather_into_tensor")
    _flatten("all_gather_single")


def flat_reduce_scatter_tensor() -> None:
    """Gloo takes the concatenated input shape only; NCCL takes the stacked one as well."""
    _flatten("reduce_scatter_tensor")
    _flatten("reduce_scatter_single")


def _flatten(name: str) -> None:
    """Let the collective see its first two arguments, output and input, in one dimension."""
    collective = getattr(dist, name, None)
    if collective is None:  # torch 2.13 has two names for each
        return
    signature = inspect.signature(collective)
    output, source = list(signature.parameters)[:2]

    @functools.wraps(collective)
    def flat_collective(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given[output].is_contiguous() and given[source].is_contiguous():
            given |= {output: given[output].view(-1), source: given[source].view(-1)}
        return collective(**given)

    _replace(name, flat_collective)


def uneven_all_gather() -> None:
    """Gloo's `all_gather` wants one size; NCCL takes a size per rank (expert tensor parallelism).

    Each rank sends what it has to every other, in one all-to-all.
    """
    gather = dist.all_gather

    @functools.wraps(gather)
    def all_gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if dist.get_rank(group) < 0 or len({t.shape for t in tensor_list}) <= 1:
            return gather(tensor_list, tensor, group=group, async_op=async_op)
        own, sizes = tensor.detach().flatten(), [one.numel() for one in tensor_list]
        gathered, sent = own.new_empty(sum(sizes)), own.repeat(len(sizes))
        work = dist.all_to_all_single(
            gathered, sent, sizes, [len(own)] * len(sizes), group=group, async_op=True
        )
        parts = list(zip(tensor_list, gathered.split(sizes), strict=True))
        work = _CopiedOut(work, parts)
        if async_op:
            return work
        work.wait()
        return None

    _replace("all_gather", all_gather)


def reduce_scatter_by_all_to_all() -> None:
    """Gloo's `reduce_scatter` of a list takes longer than the same bytes in an all-to-all.

    With experts split over 8 ranks on two cores: 106 ms for 32 rows of 32 a rank, against 4 ms.
    What one rank has of every other's is then summed at once, in the order of the ranks.
    """
    scatter = dist.reduce_scatter

    @functools.wraps(scatter)
    def reduce_scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        me, size = dist.get_rank(group), len(input_list)
        if me < 0 or size != dist.get_world_size(group) or async_op or op != dist.ReduceOp.SUM:
            return scatter(output, input_list, op=op, group=group, async_op=async_op)
        mine, sent = output.numel(), torch.cat([part.detach().flatten() for part in input_list])
        received = sent.new_empty(size, mine)
        sizes = [part.numel() for part in input_list]
        dist.all_to_all_single(received.view(-1), sent, [mine] * size, sizes, group=group)
        output.detach().copy_(received.sum(0).view_as(output))
        return None

    _replace("reduce_scatter", reduce_scatter)


class _CopiedOut:
    """An operation, after which parts of what it leaves are copied to where they belong."""

    def __init__(self, work: Any, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._work, self._parts = work, parts

    def wait(self, *args: Any) -> bool:
        self._work.wait(*args)
        for output, part in self._parts:
            output.detach().copy_(part.view_as(output))
        self._parts = []
        return True

    def is_completed(self) -> bool:
        return bool(self._work.is_completed())
