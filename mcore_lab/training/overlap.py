"""Communication of data-parallel ranks while others compute: `--training.ddp.overlap-grad-reduce`.

Megatron-Core's wrapper starts it; here is what its own training loop does so that it starts at the
right time, and ends before anything else needs the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig


def overlap_communication(config: TransformerConfig, model: list[DistributedDataParallel]) -> None:
    """Tell the pipeline's schedule when gradients and parameters are to be on their way.

    Gradients with the last micro-batch; parameters, where they are aligned, at the same time on all
    pipeline stages.
    """
    ddp = model[0].ddp_config
    if ddp.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([chunk.no_sync for chunk in model])
    if ddp.overlap_param_gather and ddp.align_param_gather:
        config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in model])


@contextmanager
def whole_parameters(model: list[DistributedDataParallel]) -> Iterator[None]:
    """Gather what the distributed optimizer's last step has left for the next forward pass.

    For a validation or a checkpoint: under `overlap_param_gather` each rank has but its own part of
    the new parameters until then.
    """
    waiting = [chunk for chunk in model if chunk.ddp_config.overlap_param_gather]
    for chunk in waiting:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in waiting:
            chunk.enable_forward_pre_hook()


def _one_or_all(functions: list[Any]) -> Any:
    """Return what the schedules take: a function, or with interleaving one for each chunk."""
    return functions[0] if len(functions) == 1 else functions
