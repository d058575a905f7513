"""Attention over ranks that share a sequence is one rank's: its output and all three gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from cp_cases import Case, assert_close, context_parallel_ranks
from on_ranks import on_ranks

from mcore_lab.backends.context_parallel import context_parallel_attention, zigzag_places

SHAPES = [
    Case(),
    Case(stored=(64,), batch=3, heads=8, groups=8),
    Case(heads=8, groups=4, scale=0.1),
    Case(batch=2, heads=8, groups=2),
    Case(channels=12, value_channels=8),
    Case(channels=8, value_channels=12),
    Case(dtype=torch.float64),
    Case(stored=(64,), batch=2, heads=8, dtype=torch.bfloat16),
]
"""One head a group and several, fewer groups than ranks, values of other widths, precisions."""


def check(case: Case, comm_type: str, groups: list[dist.ProcessGroup]) -> None:
    """Hold this rank's part of the attention to the same part of one rank's."""
    size, rank = dist.get_world_size(), dist.get_rank()
    places = zigzag_places(case.stored, rank, size)
    query, key, value, grad = (x[places] for x in case.inputs())
    inputs = [x.requires_grad_() for x in (query, key, value)]
    output = context_parallel_attention(
        *inputs,
        groups=groups,
        comm_type=comm_type,
        causal=case.causal,
        scale=case.scale,
    )
    got = output.detach(), *torch.autograd.grad(output, inputs, grad)
    for name, of_rank, of_all in zip(
        ("output", "dq", "dk", "dv"), got, case.expected(), strict=True
    ):
        assert_close(f"{name} of {case}, {comm_type}, rank {rank}", of_rank, of_all[places])


def check_all(cases: list[Case], size: int, comm_type: str) -> None:
    hierarchy = [2, size // 2] if comm_type == "a2a+p2p" else None
    with context_parallel_ranks(size, hierarchy=hierarchy) as groups:
        for case in cases:
            check(case, comm_type, groups)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("comm_type", ["p2p", "all_gather", "a2a"])
@on_ranks(2)
def test_two_ranks_attend_as_one(comm_type: str, causal: bool) -> None:
    check_all([replace(case, causal=causal) for case in SHAPES], 2, comm_type)


@pytest.mark.parametrize("comm_type", ["p2p", "all_gather", "a2a"])
@on_ranks(3)
def test_three_ranks_attend_as_one(comm_type: str) -> None:
    check_all([Case(stored=(24,), batch=2, heads=6, groups=3)], 3, comm_type)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("comm_type", ["p2p", "all_gather", "a2a", "a2a+p2p"])
@on_ranks(4)
def test_four_ranks_attend_as_one(comm_type: str, causal: bool) -> None:
    check_all([replace(case, causal=causal) for case in SHAPES], 4, comm_type)
