"""The story of a run, told once: the `main` of every recipe comes here.

Read `train` from top to bottom: what has Megatron-Core's name is Megatron-Core's.
"""

from __future__ import annotations

import math
import random
import signal
import time
from functools import partial

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from mcore_lab.backends import choose_backend
from mcore_lab.checkpoint import starting_point
from mcore_lab.checkpoint.load import load_checkpoint, load_weights
from mcore_lab.checkpoint.publication import clean_up
from mcore_lab.checkpoint.saver import Saver
from mcore_lab.checkpoint.state import Progress
from mcore_lab.config import Recipe, recipe_to_toml
from mcore_lab.data.batches import global_batches
from mcore_lab.data.datasets import build_datasets
from mcore_lab.model import (
    BuildChunk,
    model_vocab_size,
    on_device,
    pipeline_stages,
    refusals_explained,
    transformer_config,
)
from mcore_lab.recipes.builder import own_build, recipe_chunk
from mcore_lab.runtime import World
from mcore_lab.training.evaluate import evaluate
from mcore_lab.training.flops import step_flops
from mcore_lab.training.forward import ForwardStep, forward_step, mean_mtp_loss
from mcore_lab.training.not_finite import not_finite_where
from mcore_lab.training.optimizer import ddp_config, lr_scheduler, optimizer_config
from mcore_lab.training.outcome import step_outcome
from mcore_lab.training.overlap import overlap_communication, whole_parameters
from mcore_lab.training.recorder import Recorder, Summary
from mcore_lab.training.stop import StopRequest


def train(
    recipe: Recipe,
    world: World,
    recorder: Recorder,
    *,
    build: BuildChunk = recipe_chunk,
    forward_step: ForwardStep = forward_step,
    stop: StopRequest | None = None,
) -> Summary:
    """Train `recipe` on this rank of `world`, with all the others, and return how it ended.

    `build` and `forward_step` put another model in the place of the recipe's. When `stop` is
    made on any rank, all of them save after the step that they are in, and raise PreemptedError.
    """
    data, training = recipe.data, recipe.training

    # Who is who: this rank joins the groups of its tensor, pipeline, context, expert, data peers.
    parallel_state.initialize_model_parallel(
        **recipe.layout.model_parallel_sizes(),
        distributed_timeout_minutes=world.timeout_seconds / 60,
    )
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

    if build is recipe_chunk and own_build(recipe) is None:
        rows = model_vocab_size(recipe, datasets.vocab_size)
        recorder.step_flops = step_flops(recipe, config, rows)
    recorder.begin(recipe, world, backend, progress.step)
    if world.is_first:
        clean_up(checkpoints)
    recorder.look_at_start(model, optimizer, scheduler)
    saver = Saver(
        checkpoints,
        (model, optimizer, scheduler),
        recipe_to_toml(recipe),
        keep=recipe.checkpoint.keep,
        in_background=recipe.checkpoint.async_save,
        saved=recorder.saved,
        not_saved=recorder.not_saved,
    )
    if training.steps == 0 and recipe.checkpoint.save:
        # The initial weights, for runs on other layouts to start from.
        saver.save(progress)
    microbatches = partial(
        forward_backward,
        forward_step_func=forward_step,
        model=model,
        num_microbatches=batches.num_microbatches,
        seq_length=recipe.layout.padded(data.sequence_length),
        micro_batch_size=data.micro_batch_size,
    )
    phases = recorder.phases
    if stop:
        stop.heed(signal.SIGTERM)
    while progress.step < training.steps:
        recorder.begin_step(progress.step + 1)
        started = time.perf_counter()
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        batch = [phases.reading(batches.after(progress.consumed_train_samples)) for _ in model]
        reports = microbatches(data_iterator=batch, forward_only=False)
        recorder.look_at_gradients(progress.step + 1, model, reports)
        asked = stop is not None and stop.is_made
        outcome = step_outcome(reports, model, stop_asked=asked, is_writing=saver.is_writing)
        grad_norm, lr = math.nan, optimizer.param_groups[0]["lr"]
        if outcome.is_finite:
            with phases.of_optimizer():
                _, grad_norm, _ = optimizer.step()
            scheduler.step(increment=1)
        mtp_loss = mean_mtp_loss(config, batches.num_microbatches)
        seconds = time.perf_counter() - started
        before, progress = progress, progress.after_step_of(data.global_batch_size)
        step = progress.step
        recorder.step(step, outcome.loss, grad_norm, lr, seconds, mtp_loss)
        if not outcome.is_finite:
            batch = [batches.after(before.consumed_train_samples) for _ in model]
            again = partial(microbatches, data_iterator=batch, forward_only=True)
            where = not_finite_where(model, outcome.loss, again)
            if training.on_not_finite == "stop":
                saver.settle()
            recorder.not_taken(where, goes_on=training.on_not_finite == "skip")

        if datasets.valid and training.evaluates_after(step):
            with recorder.between_steps("validation"), whole_parameters(model):
                loss = evaluate(recipe, datasets.valid, model, forward_backward, forward_step)
            recorder.validation(loss)
        if outcome.all_written:
            saver.settle()
        if recipe.checkpoint.saves_after(step, training.steps, stops=outcome.must_stop):
            with recorder.between_steps("checkpoint"), whole_parameters(model):
                can_miss = recipe.checkpoint.can_miss(step, training.steps)
                saver.save(progress, can_miss=can_miss and not outcome.must_stop)
        if outcome.must_stop and step < training.steps:
            saver.settle()
            recorder.stopped()
    saver.settle()
    with whole_parameters(model):
        recorder.look_at_end(model, optimizer, scheduler)
    return recorder.summary()
