"""The lessons' data parallelism and ZeRO beside Megatron-Core's, from the same weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mcore_lab import cpu

cpu.preload()

from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from mcore_lab.layout import ParallelLayout  # noqa: E402
from mcore_lab.lessons import data_parallel, zero  # noqa: E402
from mcore_lab.runtime import model_parallel  # noqa: E402

LAYERS, WIDTH, SAMPLES, STEPS, LR = 4, 24, 6, 4, 1e-2


def replicas_on_rank() -> dict[str, Any]:
    """Return how far gradients and weights are from Megatron-Core's, and when reductions began."""
    with model_parallel(ParallelLayout()) as world:
        draw = torch.Generator().manual_seed(world.rank)
        x, target = torch.randn(2, SAMPLES, WIDTH, generator=draw)
        return {
            "after": _data_parallel(x, target, overlap=False),
            "overlapped": _data_parallel(x, target, overlap=True),
            "zero": _zero(x, target),
        }


def _data_parallel(x: Tensor, target: Tensor, overlap: bool) -> dict[str, Any]:
    theirs = _wrapped(_model(), overlap_grad_reduce=overlap)
    F.mse_loss(theirs(x), target).backward()
    theirs.finish_grad_sync()

    model = _model()
    # A layer has 2,400 bytes. Two steps of no length: the gradients are those of the second alone.
    settings = data_parallel.Settings(bucket_mib=2000 / 2**20, lr=0.0)
    assert dist.group.WORLD
    replica = data_parallel.Replica(model, dist.group.WORLD, settings, overlap)
    begun: list[bool] = []
    next(model.parameters()).register_post_accumulate_grad_hook(
        lambda _: begun.append(replica.buckets[0].work is not None)
    )
    for _ in range(2):
        replica.step(x, target)
    pairs = zip(model.parameters(), theirs.module.parameters(), strict=True)
    return {
        "gradients": max(float((one.grad - two.main_grad).abs().max()) for one, two in pairs),
        "buckets": len(replica.buckets),
        "last layer's reduction had begun when the backward came to the first": begun,
    }


def _zero(x: Tensor, target: Tensor) -> dict[str, Any]:
    theirs = _wrapped(_model(), use_distributed_optimizer=True)
    config = OptimizerConfig(lr=LR, weight_decay=0.0, clip_grad=0.0, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(config, [theirs])
    model = _model()
    assert dist.group.WORLD
    sharded = zero.ShardedAdam(model, dist.group.WORLD, LR)
    for _ in range(STEPS):
        theirs.zero_grad_buffer()
        F.mse_loss(theirs(x), target).backward()
        theirs.finish_grad_sync()
        optimizer.step()
        F.mse_loss(model(x), target).backward()
        sharded.step()
    pairs = zip(model.parameters(), theirs.module.parameters(), strict=True)
    moved = zip(model.parameters(), _model().parameters(), strict=True)
    return {
        "weights": max(float((one - two).abs().max()) for one, two in pairs),
        "moved by": min(float((one - two).abs().max()) for one, two in moved),
    }


def _model() -> nn.Sequential:
    return data_parallel.deep_mlp(LAYERS, WIDTH, seed=7)


def _wrapped(model: nn.Module, **fields: Any) -> Any:
    config = TransformerConfig(num_layers=1, hidden_size=WIDTH, num_attention_heads=1)
    return DistributedDataParallel(config, DistributedDataParallelConfig(**fields), model)
