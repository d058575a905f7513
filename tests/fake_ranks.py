"""Any rank of any world in this one process, with Megatron-Core's real `parallel_state`.

torch's "fake" backend makes real process groups whose collectives do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from mcore_lab import cpu
from mcore_lab.layout import ParallelLayout

cpu.preload()

from megatron.core import parallel_state  # noqa: E402

GROUPS: dict[str, Callable[[], Any]] = {
    "tp": parallel_state.get_tensor_model_parallel_group,
    "cp": parallel_state.get_context_parallel_group,
    "dp": parallel_state.get_data_parallel_group,
    "pp": parallel_state.get_pipeline_model_parallel_group,
    "dp-cp": lambda: parallel_state.get_data_parallel_group(with_context_parallel=True),
    "tp-pp": parallel_state.get_model_parallel_group,
    "tp-cp": parallel_state.get_tensor_and_context_parallel_group,
    "tp-dp": parallel_state.get_tensor_and_data_parallel_group,
    "tp-dp-cp": lambda: parallel_state.get_tensor_and_data_parallel_group(
        with_context_parallel=True
    ),
    "ep": parallel_state.get_expert_model_parallel_group,
    "etp": parallel_state.get_expert_tensor_parallel_group,
    "edp": parallel_state.get_expert_data_parallel_group,
    "etp-ep": parallel_state.get_expert_tensor_and_model_parallel_group,
    "etp-ep-pp": parallel_state.get_expert_tensor_model_pipeline_parallel_group,
    "embedding": lambda: parallel_state.get_embedding_group(check_initialized=False),
    "position-embedding": lambda: parallel_state.get_position_embedding_group(
        check_initialized=False
    ),
}
"""How Megatron-Core is asked for a rank's group of each kind."""


@contextmanager
def rank_of_world(rank: int, world_size: int) -> Iterator[None]:
    torch.distributed.init_process_group(
        backend="fake", store=FakeStore(), rank=rank, world_size=world_size
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def initialize(layout: ParallelLayout) -> None:
    parallel_state.initialize_model_parallel(
        **layout.model_parallel_sizes(), create_gloo_process_groups=False
    )


def is_refused(build: Callable[[], Any]) -> bool:
    try:
        build()
    except (AssertionError, RuntimeError, ValueError, ZeroDivisionError):
        return True
    return False
