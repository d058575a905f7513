"""Megatron-Core's DDP, optimizer and schedule, from a recipe."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mcore_lab.config import Recipe, Training
from mcore_lab.model import configuration
from mcore_lab.training.rules import decay_steps

_WSD_DECAY_SHARE = 0.2


def ddp_config(recipe: Recipe) -> DistributedDataParallelConfig:
    """Return how gradients are reduced over data-parallel ranks: in fp32, if nothing else is said.

    Raises ConfigError with Megatron-Core's own words for what it refuses.
    """
    fields: dict[str, Any] = {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": recipe.layout.use_distributed_optimizer,
    }
    return configuration(DistributedDataParallelConfig, fields, recipe.training.ddp)


def optimizer_config(recipe: Recipe) -> OptimizerConfig:
    """Return Adam with clipping; under bf16 with fp32 main weights.

    Raises ConfigError with Megatron-Core's own words for what it refuses.
    """
    training = recipe.training
    bf16 = training.precision == "bf16"
    fields: dict[str, Any] = {
        "optimizer": "adam",
        "lr": training.lr,
        "min_lr": training.min_lr,
        "weight_decay": training.weight_decay,
        "adam_beta1": training.adam_beta1,
        "adam_beta2": training.adam_beta2,
        "adam_eps": training.adam_eps,
        # A limit that nothing reaches, as Megatron-Core measures no norm without one.
        "clip_grad": training.clip_grad or math.inf,
        "bf16": bf16,
        "params_dtype": torch.bfloat16 if bf16 else torch.float32,
        "use_distributed_optimizer": recipe.layout.use_distributed_optimizer,
        "overlap_param_gather": training.ddp.get("overlap_param_gather", False),
    }
    return configuration(OptimizerConfig, fields, training.optimizer)


def lr_scheduler(training: Training, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Return the learning rate's course, counted in optimizer steps.

    WSD (warm-up, stable, decay) decays over the last fifth. A checkpoint brings the number of steps
    that have been taken; the course itself is always the recipe's.
    """
    steps = decay_steps(training)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=training.min_lr,
        lr_warmup_steps=training.lr_warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=training.lr_decay_style,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        wsd_decay_steps=max(1, round(steps * _WSD_DECAY_SHARE)),
        lr_wsd_decay_style="cosine",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
