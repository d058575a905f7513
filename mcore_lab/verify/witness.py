"""A recorder that writes nothing and sees everything: what a run computed, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mcore_lab.backends import Backend
from mcore_lab.checkpoint import step_folder
from mcore_lab.checkpoint.save import save_checkpoint
from mcore_lab.checkpoint.state import Progress, content_metadata, model_state
from mcore_lab.compat import take_auxiliary_losses
from mcore_lab.config import Recipe, recipe_to_toml
from mcore_lab.runtime import RankLog, World
from mcore_lab.training import RunFolder
from mcore_lab.training.console import Console
from mcore_lab.training.recorder import Recorder
from mcore_lab.verify.activations import Activations
from mcore_lab.verify.snapshot import Snapshot, Tensors
from mcore_lab.verify.unshard import Whole, gradients, whole_tensors

_MOMENT = "optimizer.state."
_OF_ONE_RANK = "z_loss"
"""Megatron-Core reports the z-loss of a rank's own tokens; its gradients are of all."""


class Witness(Recorder):
    """Takes a `Snapshot` of a run; with `initial`, it saves the weights that it starts from."""

    def __init__(self, log: RankLog, initial: Path | None = None) -> None:
        nowhere = RunFolder(Path("nowhere"))
        super().__init__(nowhere, log, Console(speaks=False), recipe_toml="", fresh=False)
        self.snapshot = Snapshot()
        self._initial = initial

    def begin(self, recipe: Recipe, world: World, backend: Backend, first_step: int) -> None:
        """Note what runs."""
        self._recipe = recipe

    def look_at_start(self, model: list[Any], optimizer: Any, scheduler: Any) -> None:
        """Keep the initial weights, and watch the first micro-batch go through."""
        if self._initial:
            folder, recipe = step_folder(self._initial, 0), recipe_to_toml(self._recipe)
            save_checkpoint(folder, model, optimizer, scheduler, Progress(), recipe)
        self.snapshot.initial_weights = self._kept(whole_tensors(model_state(model)))
        self._activations = Activations(self._recipe, model)

    def look_at_gradients(self, step: int, model: list[Any], reports: list[Any]) -> None:
        """Keep each micro-batch's loss, and of the first step everything that led to its update."""
        self.snapshot.losses.append(_losses(reports))
        if step > 1:
            return
        microbatches = len(self.snapshot.losses[0]) // _replicas()
        self.snapshot.auxiliary_losses = {
            name: [value / microbatches for value in values]
            for name, values in take_auxiliary_losses().items()
            if name != _OF_ONE_RANK
        }
        self.snapshot.activations, torn = self._activations.whole()
        self.snapshot.torn |= {name: (spread, "tensor-parallel") for name, spread in torn.items()}
        self.snapshot.gradients = self._kept(whole_tensors(gradients(model)), "gradient of ")

    def step(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        lr: float,
        seconds: float,
        mtp_loss: float | None = None,
    ) -> None:
        """Keep the step's numbers."""
        self.snapshot.grad_norms.append(float(grad_norm))
        self.snapshot.learning_rates.append(lr)
        if step == 1 and mtp_loss is not None:
            self.snapshot.auxiliary_losses["multi-token prediction"] = [mtp_loss]

    def look_at_end(self, model: list[Any], optimizer: Any, scheduler: Any) -> None:
        """Keep the weights and Adam's moments."""
        state = model_state(model)
        self.snapshot.weights = self._kept(whole_tensors(state), "weight ")
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        names = state["model"] if len(model) == 1 else state
        metadata = content_metadata(model) | {"dp_cp_group": group}
        moments = whole_tensors(optimizer.sharded_state_dict(dict(names), metadata=metadata))
        self.snapshot.moments = {
            name.removeprefix(_MOMENT): tensor
            for name, tensor in moments.tensors.items()
            if name.startswith((f"{_MOMENT}exp_avg.", f"{_MOMENT}exp_avg_sq."))
        }

    def _kept(self, whole: Whole, what: str = "") -> Tensors:
        if what:
            self.snapshot.torn |= {what + name: torn for name, torn in whole.torn.items()}
        return whole.tensors


def _replicas() -> int:
    return int(parallel_state.get_data_parallel_world_size())


def _losses(reports: list[dict[str, torch.Tensor]]) -> list[float]:
    """Return the mean loss of every micro-batch of the step, in the order of their samples.

    A rank has those of its replica, and under context parallelism of its part of them.
    """
    is_reporting = bool(reports) and parallel_state.get_tensor_model_parallel_rank() == 0
    own = [report["lm loss"].double().tolist() for report in reports] if is_reporting else []
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (parallel_state.get_data_parallel_rank(), own))
    replicas = _replicas()
    totals: dict[int, tuple[float, float]] = {}
    for replica, sums in of_ranks:
        for number, (loss, tokens) in enumerate(sums):
            place = number * replicas + replica
            so_far = totals.get(place, (0.0, 0.0))
            totals[place] = so_far[0] + loss, so_far[1] + tokens
    return [loss / max(tokens, 1.0) for _, (loss, tokens) in sorted(totals.items())]
