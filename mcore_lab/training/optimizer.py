"""Megatron-Core's DDP, optimizer and schedule, from a recipe."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mcore_lab.config import Recipe, Training


def ddp_config(recipe: Recipe) -> DistributedDataParallelConfig:
    """Return how data-parallel gradients are reduced: in fp32, split where the optimizer is."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=recipe.layout.use_distributed_optimizer,
    )


def optimizer_config(recipe: Recipe) -> OptimizerConfig:
    """Return Adam with clipping; under bf16 with fp32 main weights."""
    training = recipe.training
    bf16 = training.precision == "bf16"
    return OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=recipe.layout.use_distributed_optimizer,
    )


def lr_scheduler(training: Training, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Return the learning rate's course, counted in optimizer steps."""
    decay_steps = training.lr_decay_steps or max(training.steps, training.lr_warmup_steps + 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=training.min_lr,
        lr_warmup_steps=training.lr_warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=training.lr_decay_style,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant",
        wsd_decay_steps=decay_steps,
        lr_wsd_decay_style="cosine",
    )
