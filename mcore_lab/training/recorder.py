"""What is written down and shown of a run; rank 0 does it, the other ranks keep their logs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from mcore_lab.backends import Backend
from mcore_lab.config import Recipe
from mcore_lab.errors import CheckpointError, NotFiniteError, PreemptedError
from mcore_lab.runtime import RankLog, World
from mcore_lab.runtime.together import fail_together
from mcore_lab.training.console import Console
from mcore_lab.training.expert_balance import worst_imbalance
from mcore_lab.training.expert_load import ExpertLoad
from mcore_lab.training.flops import device_peak_flops
from mcore_lab.training.metrics import StepMetrics, peak_memory_bytes
from mcore_lab.training.phases import Phases
from mcore_lab.training.run_folder import RunFolder
from mcore_lab.training.track import Tracking

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a run ended."""

    run_dir: str
    steps: int
    """Steps that have been taken in all."""
    loss: float | None
    """Loss of the last step; None if none was taken."""
    valid_loss: float | None
    checkpoint: str | None
    """The last checkpoint that was written."""


@dataclass(frozen=True, kw_only=True)
class LegSummary(Summary):
    """How a leg of a run ended, and where it ran."""

    ranks: int
    layout: str


@dataclass(frozen=True, kw_only=True)
class SummaryOfLegs(Summary):
    """How a run of several layouts ended."""

    legs: tuple[LegSummary, ...]
    """In the order in which they ran; a run that goes on has those that it had left."""


class Recorder:
    """Keeps the run folder and talks to a person."""

    def __init__(
        self,
        folder: RunFolder,
        log: RankLog,
        console: Console,
        *,
        recipe_toml: str,
        fresh: bool,
        launch: str = "",
        track: str | None = None,
    ) -> None:
        self.folder = folder
        self._log, self._console = log, console
        self._recipe_toml, self._fresh, self._launch = recipe_toml, fresh, launch
        self._tracking = Tracking(track, self._warn)
        self.phases = Phases()
        self.step_flops: float | None = None
        """Operations of a step on all ranks together, if they are known."""
        self._experts: ExpertLoad | None = None
        self._steps = 0
        self._last: StepMetrics | None = None
        self._valid_loss: float | None = None
        self._checkpoint: Path | None = None

    def begin(self, recipe: Recipe, world: World, backend: Backend, first_step: int) -> None:
        """Make the run folder, now that everything is ready to run, and say what runs."""
        self._tokens = recipe.data.global_batch_size * recipe.data.sequence_length
        self._peak_flops = device_peak_flops(recipe, world.device.type)
        self._recipe, self._world = recipe, world
        self._steps = first_step
        with fail_together():
            if world.is_first:
                self.folder.begin(
                    self._recipe_toml,
                    fresh=self._fresh,
                    first_step=first_step,
                    launch=self._launch,
                )
                self._tracking.start(recipe, self.folder.path, first_step)
        self._log.write_to(self.folder.logs)
        _LOGGER.info("rank %d of %d, process %d", world.rank, world.size, os.getpid())
        device = world.device
        unit = "GPU" if device.type == "cuda" else "rank"
        self._console.begin(first_step, recipe.training.steps, unit=unit)
        ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
        self._console.say(f"{recipe.title}: {ranks}, run folder {self.folder.path}")
        self._console.say(f"device {device.type} with {device.communication}: {device.reason}")
        self._console.say(f"backend {backend.name}: {backend.reason}")

    def begin_step(self, step: int) -> None:
        """See that a step begins."""
        self.phases.begin()

    def step(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        lr: float,
        seconds: float,
        mtp_loss: float | None = None,
    ) -> None:
        """Record a step; one that was not taken has no norm of its gradient (nan)."""
        self._steps = step
        flops, peak = self.step_flops, self._peak_flops
        load = self._experts.take() if self._experts else {}
        of_a_rank = None if flops is None else flops / (seconds * self._world.size)
        self._last = StepMetrics(
            step=step,
            loss=loss,
            grad_norm=float(grad_norm),
            lr=lr,
            step_seconds=seconds,
            tokens_per_second=self._tokens / seconds,
            peak_memory_bytes=peak_memory_bytes(self._world.device.type),
            mtp_loss=mtp_loss,
            tflops_per_rank=None if of_a_rank is None else of_a_rank / 1e12,
            mfu=None if of_a_rank is None or peak is None else of_a_rank / peak,
            expert_imbalance=worst_imbalance(load),
            tokens_per_expert=load or None,
            seconds_by_phase=self.phases.take(seconds),
        )
        if self._world.is_first:
            self.folder.record(self._last)
            self._tracking.step(step, asdict(self._last))
            self._console.step(self._last)

    def not_taken(self, where: str, *, goes_on: bool) -> None:
        """Say why the step that was recorded last was not taken.

        Raises NotFiniteError unless the run `goes_on`.
        """
        why = f"step {self._steps} is not taken: {where}"
        _LOGGER.warning("%s", why)
        if goes_on:
            self._console.say(f"warning: {why}; the run goes on without it")
            return
        last = self._checkpoint or "none of this run"
        raise NotFiniteError(
            f"{why}; the run stops here, its last checkpoint is {last} "
            "(--training.on-not-finite skip goes on without such a step)"
        )

    def stopped(self) -> None:
        """Raise PreemptedError, which says how to go on."""
        if self._checkpoint is None:
            how = "without a checkpoint, as --checkpoint.save is False"
        else:
            how = f"with the checkpoint {self._checkpoint}: --training.resume auto goes on from it"
        raise PreemptedError(f"a signal stopped the run after step {self._steps}, {how}")

    def validation(self, loss: float) -> None:
        """Record the loss on the validation samples after the step that was recorded last."""
        self._valid_loss = loss
        if self._world.is_first:
            self.folder.record_validation(self._steps, loss)
            self._tracking.step(self._steps, {"valid_loss": loss})
            self._console.say(f"step {self._steps}  validation loss {loss:.4f} nats a token")

    def saved(self, checkpoint: Path) -> None:
        """Note a checkpoint that was written."""
        self._checkpoint = checkpoint

    def not_saved(self, error: CheckpointError) -> None:
        """Say that a checkpoint could not be written, and that the run goes on."""
        _LOGGER.warning("%s", error)
        last = self._checkpoint or "none of this run"
        self._console.say(f"warning: {error}; the run goes on, its last checkpoint is {last}")

    @contextmanager
    def between_steps(self, what: str) -> Iterator[None]:
        """Note how long the run stands still for what the body does, a checkpoint for one."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        _LOGGER.info("%s after step %d: %.3f s", what, self._steps, seconds)
        self._tracking.step(self._steps, {f"{what}_seconds": seconds})

    def look_at_start(
        self,
        model: list[torch.nn.Module],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
    ) -> None:
        """See everything as it is before the first step; from then on, count and time."""
        if self._recipe.model.num_moe_experts:
            self._experts = ExpertLoad(model)
        if self._world.is_first:
            self.phases.watch(get_model_config(model[0]), self._world.device.type)

    def look_at_gradients(
        self, step: int, model: list[torch.nn.Module], reports: list[dict[str, torch.Tensor]]
    ) -> None:
        """See a step's gradients, reduced and before they are clipped, and its reported losses."""

    def look_at_end(
        self,
        model: list[torch.nn.Module],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
    ) -> None:
        """See everything as it is after the last step."""

    def close(self) -> None:
        """Let go of what is held beside the run's folder, however the run has ended."""
        self._tracking.end()

    def _warn(self, what: str) -> None:
        _LOGGER.warning("%s", what)
        self._console.say(f"warning: {what}")

    def summary(self) -> Summary:
        """Return how the run ended, and say where its checkpoint is."""
        if self._checkpoint:
            self._console.say(f"checkpoint {self._checkpoint}")
        return Summary(
            run_dir=str(self.folder.path),
            steps=self._steps,
            loss=self._last.loss if self._last else None,
            valid_loss=self._valid_loss,
            checkpoint=str(self._checkpoint) if self._checkpoint else None,
        )
