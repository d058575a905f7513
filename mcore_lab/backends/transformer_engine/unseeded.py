"""Weights of layers that are built before any random state has been seeded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import (
    get_data_parallel_rng_tracker_name,
    get_expert_parallel_rng_tracker_name,
)

_MODEL_PARALLEL = "model-parallel-rng"


@contextmanager
def draws_unseeded() -> Iterator[None]:
    """Let weights be drawn in the body from the device's own state, if none has been seeded.

    Megatron-Core hands Transformer Engine no tracker then, and its layers draw without one; layers
    of Megatron-Core's own ask for a state that has to be there.
    """
    tracker = get_cuda_rng_tracker()
    if tracker.is_initialized():
        yield
        return
    before = torch.cuda.get_rng_state()
    names = (
        _MODEL_PARALLEL,
        get_data_parallel_rng_tracker_name(),
        get_expert_parallel_rng_tracker_name(),
    )
    states = dict.fromkeys(names, before)
    tracker.set_states(states)
    try:
        yield
    finally:
        tracker.reset()
        for state in states.values():
            if not torch.equal(state, before):
                torch.cuda.set_rng_state(state)
