"""Run a recipe on one rank and on a layout, from the same weights, and compare the results."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from mcore_lab.backends import Backend
from mcore_lab.checkpoint import step_folder
from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.layout.words import sizes_in_use
from mcore_lab.model import BuildChunk, Stage
from mcore_lab.recipes.builder import recipe_chunk
from mcore_lab.recipes.story import train
from mcore_lab.runtime import RankLog, choose_device, launch, process_group
from mcore_lab.training.forward import ForwardStep, forward_step
from mcore_lab.verify.comparable import require_comparable
from mcore_lab.verify.compare import compare
from mcore_lab.verify.report import VerificationReport
from mcore_lab.verify.signatures import hints
from mcore_lab.verify.snapshot import Snapshot
from mcore_lab.verify.tolerance import Tolerances
from mcore_lab.verify.witness import Witness

STEPS = 3
"""Steps that are compared if nothing else is said."""


def verify(
    recipe: Recipe,
    layout: ParallelLayout,
    nproc: int,
    *,
    steps: int = STEPS,
    build: BuildChunk = recipe_chunk,
    forward_step: ForwardStep = forward_step,
    timeout: float | None = None,
) -> VerificationReport:
    """Say whether a layout of `nproc` ranks computes what one rank computes.

    One rank trains first, and its initial weights become a sharded checkpoint; then the layout
    trains from that checkpoint, on the same samples. Weights that start at zero or one, such as
    biases, are drawn first: there an error would leave no trace. What is verified is the recipe's
    model, or where its name is a file, what that builds (`mcore-lab new`). To verify another, give
    `build`, which returns this rank's part of it as a `MegatronModule` with what Megatron-Core's
    schedules ask for, `model_type` and `set_input_tensor` (see `mcore_lab.model.gpt_chunk`), and,
    if it takes other arguments, a `forward_step` (see `mcore_lab.training.forward`).

    Raises ConfigError for what depends on the layout by its definition, LayoutError for a layout
    that breaks a rule, and RankFailedError if a rank fails or `timeout` seconds pass.
    """
    device = choose_device(nproc).type
    with tempfile.TemporaryDirectory(prefix="mcore_lab-") as folder:
        reference = Reference(recipe, Path(folder), steps, build, forward_step, timeout, device)
        return reference.verify(layout, nproc)


class Reference:
    """What one rank computes, kept to hold several layouts against it."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        steps: int = STEPS,
        build: BuildChunk = recipe_chunk,
        forward_step: ForwardStep = forward_step,
        timeout: float | None = None,
        device: str = "cpu",
    ) -> None:
        require_comparable(recipe)
        self._device = device
        self._initial = folder / "initial"
        checkpoint = replace(recipe.checkpoint, save=False, load=None)
        training = replace(recipe.training, steps=steps, resume="none", eval_every=None)
        data = replace(recipe.data, split="100,0,0")
        self._recipe = replace(recipe, training=training, checkpoint=checkpoint, data=data)
        self._model = build, forward_step
        self._timeout = timeout
        one_rank = replace(self._recipe, layout=ParallelLayout())
        one_rank.layout.require(recipe.model, recipe.data, 1)
        self.snapshot = self._run(one_rank, 1, self._initial)

    def verify(self, layout: ParallelLayout, nproc: int) -> VerificationReport:
        """Hold a layout on `nproc` ranks against one rank."""
        layout.require(self._recipe.model, self._recipe.data, nproc)
        start = str(step_folder(self._initial, 0))
        checkpoint = replace(self._recipe.checkpoint, load=start)
        recipe = replace(self._recipe, layout=layout, checkpoint=checkpoint)
        candidate = self._run(recipe, nproc, None)
        steps = recipe.training.steps
        verdicts = compare(self.snapshot, candidate, Tolerances.of(recipe, steps))
        return VerificationReport(
            recipe=recipe.title,
            layout=sizes_in_use(layout, nproc),
            world_size=nproc,
            precision=recipe.training.precision,
            steps=steps,
            verdicts=tuple(verdicts),
            hints=tuple(hints(verdicts, recipe, nproc)),
            losses=tuple(zip(*map(_mean_losses, (self.snapshot, candidate)), strict=False)),
        )

    def _run(self, recipe: Recipe, nproc: int, initial: Path | None) -> Snapshot:
        return launch(
            _rank,
            nproc,
            self._device,
            recipe,
            initial,
            *self._model,
            timeout=self._timeout,
            device=self._device,
        )[0]


def _mean_losses(snapshot: Snapshot) -> list[float]:
    return [sum(of_step) / len(of_step) for of_step in snapshot.losses]


def _rank(
    device: str,
    recipe: Recipe,
    initial: Path | None,
    build: BuildChunk,
    forward_step: ForwardStep,
) -> Snapshot:
    with RankLog(int(os.environ["RANK"])) as log, process_group(device=device) as world:
        witness = Witness(log, initial)
        if initial:
            build = _with_no_constants(build)
        train(recipe, world, witness, build=build, forward_step=forward_step)
        return witness.snapshot


def _with_no_constants(build: BuildChunk) -> BuildChunk:
    """Draw the weights that start as zeros or ones too, such as biases and those of norms.

    A bias of zero may be added twice, and a norm's weight of one be another's, without a trace.
    """

    def built(
        recipe: Recipe, config: TransformerConfig, stage: Stage, backend: Backend, vocab_size: int
    ) -> torch.nn.Module:
        chunk = build(recipe, config, stage, backend, vocab_size)
        with torch.no_grad():
            for weight in chunk.parameters():
                if bool((weight == weight.flatten()[0]).all()):
                    weight.add_(torch.randn_like(weight), alpha=config.init_method_std)
        return chunk

    return built
