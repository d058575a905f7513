"""The story of a run, told once: the `main` of every recipe comes here.

Read `train` from top to bottom: what has Megatron-Core's name is Megatron-Core's.
"""

from __future__ import annotations

import random
import time

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from mcore_lab.backends import choose_backend
from mcore_lab.checkpoint import starting_point, step_folder
from mcore_lab.checkpoint.failures import failures_missed
from mcore_lab.checkpoint.load import load_checkpoint, load_weights
from mcore_lab.checkpoint.publication import clean_up
from mcore_lab.checkpoint.save import save_checkpoint
from mcore_lab.checkpoint.state import Progress
from mcore_lab.config import Recipe, recipe_to_toml
from mcore_lab.data.batches import global_batches
from mcore_lab.data.datasets import build_datasets
from mcore_lab.model import (
    BuildChunk,
    gpt_chunk,
    on_device,
    pipeline_stages,
    refusals_explained,
    transformer_config,
)
from mcore_lab.runtime import World
from mcore_lab.training.evaluate import evaluate
from mcore_lab.training.forward import ForwardStep, forward_step, mean_loss, mean_mtp_loss
from mcore_lab.training.optimizer import ddp_config, lr_scheduler, optimizer_config
from mcore_lab.training.overlap import overlap_communication, whole_parameters
from mcore_lab.training.recorder import Recorder, Summary


def train(
    recipe: Recipe,
    world: World,
    recorder: Recorder,
    *,
    build: BuildChunk = gpt_chunk,
    forward_step: ForwardStep = forward_step,
) -> Summary:
    """Train `recipe` on this rank of `world`, with all the others, and return how it ended.

    `build` and `forward_step` put another model in the place of the recipe's GPT.
    """
    data, training = recipe.data, recipe.training

    # Who is who: this rank joins the groups of its tensor, pipeline, context, expert, data peers.
    parallel_state.initialize_model_parallel(**recipe.layout.model_parallel_sizes())
    random.seed(training.seed)
    np.random.seed(training.seed % 2**32)
    torch.manual_seed(training.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(training.seed)

    # What it learns from: samples drawn by global index, this rank's share of each step.
    datasets = build_datasets(data)
    batches = global_batches(recipe, datasets.train)

    # What it holds: its slice of its layers, in one chunk a (virtual) pipeline stage.
    config = transformer_config(recipe)
    backend = choose_backend(recipe.model.backend, world.device.type)
    with refusals_explained():
        chunks = [
            build(recipe, config, stage, backend, datasets.vocab_size)
            for stage in pipeline_stages(recipe.layout)
        ]
    model = [
        DistributedDataParallel(config, ddp_config(recipe), on_device(config, chunk))
        for chunk in chunks
    ]

    # What moves it: Adam, the learning rate's course, and the pipeline's schedule.
    optimizer = get_megatron_optimizer(optimizer_config(recipe), model)
    scheduler = lr_scheduler(training, optimizer)
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    overlap_communication(config, model)
    forward_backward = get_forward_backward_func()

    # Where it starts: at step 0, or where a checkpoint of any layout left off.
    progress = Progress()
    checkpoints = recorder.folder.checkpoints
    if start := starting_point(recipe.checkpoint.load, training.resume, checkpoints):
        verify = recipe.checkpoint.verify == "on"
        if start.weights_only:
            load_weights(start.path, model, optimizer, verify=verify)
        else:
            progress = load_checkpoint(start.path, model, optimizer, scheduler, verify=verify)

    toml = recipe_to_toml(recipe)
    recorder.begin(recipe, world, backend, progress.step)
    if world.is_first:
        clean_up(checkpoints)
    recorder.look_at_start(model, optimizer, scheduler)
    if training.steps == 0 and recipe.checkpoint.save:
        # The initial weights, for runs on other layouts to start from.
        folder = step_folder(checkpoints, 0)
        recorder.saved(save_checkpoint(folder, model, optimizer, scheduler, progress, toml))
    while progress.step < training.steps:
        started = time.perf_counter()
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reports = forward_backward(
            forward_step_func=forward_step,
            data_iterator=[batches.after(progress.consumed_train_samples) for _ in model],
            model=model,
            num_microbatches=batches.num_microbatches,
            seq_length=recipe.layout.padded(data.sequence_length),
            micro_batch_size=data.micro_batch_size,
            forward_only=False,
        )
        progress = progress.after_step_of(data.global_batch_size)
        step = progress.step
        recorder.look_at_gradients(step, model, reports)
        _, grad_norm, _ = optimizer.step()
        loss, lr = mean_loss(reports), optimizer.param_groups[0]["lr"]
        scheduler.step(increment=1)
        mtp_loss = mean_mtp_loss(config, batches.num_microbatches)
        recorder.step(step, loss, grad_norm, lr, time.perf_counter() - started, mtp_loss)

        if datasets.valid and training.evaluates_after(step):
            with whole_parameters(model):
                loss = evaluate(recipe, datasets.valid, model, forward_backward, forward_step)
            recorder.validation(loss)
        if recipe.checkpoint.saves_after(step, last=training.steps):
            folder = step_folder(checkpoints, step)
            can_miss = recipe.checkpoint.can_miss(step, last=training.steps)
            with whole_parameters(model), failures_missed(can_miss, recorder.not_saved):
                keep = recipe.checkpoint.keep
                save_checkpoint(folder, model, optimizer, scheduler, progress, toml, keep=keep)
                recorder.saved(folder)
    with whole_parameters(model):
        recorder.look_at_end(model, optimizer, scheduler)
    return recorder.summary()
