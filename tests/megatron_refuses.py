"""Whether Megatron-Core takes a case, up to the first forward pass of a step, in this one process.

Its own `parallel_state`, `TransformerConfig`, `GPTModel`, micro-batch calculator and schedule are
asked, with the torch backend's layers, as its own "local" ones refuse context parallelism.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import torch
from fake_ranks import initialize, rank_of_world
from megatron.core.num_microbatches_calculator import ConstantNumMicroBatchesCalculator
from megatron.core.pipeline_parallel import schedules
from torch._subclasses.fake_tensor import FakeTensorMode

from mcore_lab import config
from mcore_lab.backends import Backend
from mcore_lab.errors import ConfigError, LayoutError
from mcore_lab.layout import ParallelLayout
from mcore_lab.layout.rules.case import Case
from mcore_lab.model import Stage, gpt_chunk, refusals_explained, transformer_config

TORCH = Backend(name="torch", reason="a test's")
ROWS = 96
"""Of the embedding, where a case does not say: what tp of 1, 2, 3, 4, 6 and 8 divide."""

_REFUSALS = (
    AssertionError,
    ConfigError,
    KeyError,
    LayoutError,
    RuntimeError,
    ValueError,
    ZeroDivisionError,
)


class _ReachedFirstStepError(Exception):
    """The schedule got as far as the model's first forward step."""


def refusal(case: Case, start: Callable[[Case], None] | None = None) -> str:
    """Return in what words Megatron-Core refuses to start the case; empty if it does not.

    All its stages, if it is not said what to start.
    """
    # What is built reaches for a device: an embedding that stages share, a stream of experts.
    with (
        patch.object(torch.Tensor, "cuda", lambda tensor: tensor),
        patch.object(torch.cuda, "Stream"),
    ):
        try:
            (start or start_every_stage)(case)
        except _REFUSALS as error:
            text = f"{type(error).__name__}: {error}"
            assert not re.search("CUDA|NVIDIA", text), f"this process lacks something: {text}"
            return text
    return ""


def recipe_of(case: Case) -> config.Recipe:
    """Return the recipe of a run in this case; weights are not drawn."""
    fields = {"perform_initialization": False, **case.model.transformer}
    return config.Recipe(
        name="case",
        layout=case.layout,
        model=config.Model(**{**vars(case.model), "transformer": fields}),
        data=config.Data(**vars(case.data)),
    )


def count_micro_batches(case: Case) -> int:
    """Return the micro-batches of a step on each replica."""
    layout, data = case.layout, case.data
    calculator = ConstantNumMicroBatchesCalculator(
        data.global_batch_size,
        data.micro_batch_size,
        data_parallel_size=case.world_size // (layout.tp * layout.cp * layout.pp),
        decrease_batch_size_if_needed=False,
        rank=0,
    )
    return int(calculator.get())


def start_every_stage(case: Case) -> None:
    """Start a step on the first stage, and build each other one on a rank of its own."""
    start_first_stage(case)
    for stage in range(1, case.layout.pp):
        rank = case.layout.rank_of(world_size=case.world_size, pp=stage)
        with rank_of_world(rank, case.world_size):
            chunks_of_stage(case, stage)


def start_first_stage(case: Case) -> None:
    """Build the first stage, whose rank is 0 in every order, and start a step on it."""
    with rank_of_world(0, case.world_size):
        start_step(case, chunks_of_stage(case, stage=0))


def chunks_of_stage(case: Case, stage: int) -> list[Any]:
    """Return the chunks that a stage's rank, which this one is, holds."""
    layout, recipe = case.layout, recipe_of(case)
    initialize(layout)
    transformer = transformer_config(recipe)
    rows = case.model.vocab_size or ROWS
    with refusals_explained():
        return [
            gpt_chunk(recipe, transformer, _place(layout, stage, chunk), TORCH, rows)
            for chunk in range(layout.vpp)
        ]


def _place(layout: ParallelLayout, stage: int, chunk: int) -> Stage:
    return Stage(
        vp_stage=chunk if layout.vpp > 1 else None,
        is_first=stage == chunk == 0,
        is_last=stage == layout.pp - 1 and chunk == layout.vpp - 1,
    )


def start_step(case: Case, chunks: list[Any]) -> None:
    """Start a step on this rank's chunks, up to the first forward pass."""

    def first_step(*_: Any) -> None:
        raise _ReachedFirstStepError

    # The schedule counts tokens on "cuda", where a fake tensor needs no device.
    with FakeTensorMode(allow_non_fake_inputs=True), suppress(_ReachedFirstStepError):
        schedules.get_forward_backward_func()(
            forward_step_func=first_step,
            data_iterator=[iter(())] * len(chunks),
            model=chunks,
            num_microbatches=count_micro_batches(case),
            seq_length=case.layout.padded(case.data.sequence_length),
            micro_batch_size=case.data.micro_batch_size,
            forward_only=True,
        )
