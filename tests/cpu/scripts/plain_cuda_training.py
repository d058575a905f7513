"""Megatron-Core training as one writes it for GPUs; this script knows nothing of mcore_lab.

usage: torchrun --nproc-per-node 2 plain_cuda_training.py CHECKPOINT_FOLDER
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

SEQUENCE, VOCABULARY, BATCH, STEPS = 16, 64, 4, 8


def initialize() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(backend="nccl", device_id=torch.cuda.current_device())
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    torch.manual_seed(123)
    model_parallel_cuda_manual_seed(123)


def build_model() -> DistributedDataParallel:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        tensor_model_parallel_size=2,
        finalize_model_grads_func=finalize_model_grads,
        pipeline_dtype=torch.float32,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
    ).cuda()
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model)


def loss_func(mask: torch.Tensor, output: torch.Tensor):
    loss = (output.float() * mask).sum()
    return loss, mask.sum().int(), {"loss": loss.detach().clone()}


def forward_step(batches, model):
    batch = {name: value.cuda(non_blocking=True) for name, value in next(batches).items()}
    output = model(batch["tokens"], batch["positions"], None, labels=batch["labels"])
    return output, partial(loss_func, batch["mask"])


def repeat_one_batch():
    generator = torch.Generator().manual_seed(7)
    text = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)
    while True:
        yield {
            "tokens": text[:, :-1].pin_memory(),
            "labels": text[:, 1:].pin_memory(),
            "positions": torch.arange(SEQUENCE).expand(BATCH, SEQUENCE),
            "mask": torch.ones(BATCH, SEQUENCE),
        }


def train(model: DistributedDataParallel) -> list[float]:
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-2, clip_grad=1.0), [model])
    forward_backward = get_forward_backward_func()
    batches, losses = repeat_one_batch(), []
    for _ in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        (report,) = forward_backward(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=[model],
            num_microbatches=1,
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        optimizer.step()
        torch.cuda.synchronize()
        losses.append(report["loss"].item() / (BATCH * SEQUENCE))
    return losses


def save_and_load(model: DistributedDataParallel, folder: str) -> None:
    if torch.distributed.get_rank() == 0:
        Path(folder).mkdir(parents=True)
    torch.distributed.barrier()
    trained = model.module
    dist_checkpointing.save(trained.sharded_state_dict(prefix=""), folder)
    fresh = build_model().module
    fresh.load_state_dict(dist_checkpointing.load(fresh.sharded_state_dict(prefix=""), folder))
    for (name, saved), loaded in zip(trained.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(saved, loaded), name


if __name__ == "__main__":
    initialize()
    model = build_model()
    losses = train(model)
    save_and_load(model, sys.argv[1])
    print(f"rank {torch.distributed.get_rank()} losses {losses}")
