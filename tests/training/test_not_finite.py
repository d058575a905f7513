"""A loss or a gradient that is not finite is found before it spoils anything, and placed."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SMALL, changed, losses, run
from watching import Recorder, run_with

from mcore_lab.checkpoint.contents import tensors_of
from mcore_lab.checkpoint.difference import read
from mcore_lab.config import Recipe
from mcore_lab.errors import NotFiniteError
from mcore_lab.runtime.wrappers import unwrapped

STEP = 3
PP2 = changed(SMALL, layout={"pipeline_model_parallel_size": 2}, checkpoint={"save_every": 2})


class Planting(Recorder):
    """Spoils step 3 on rank 1: what a layer returns there, or the gradient of a weight."""

    module, parameter = "decoder.layers.1.mlp.linear_fc1", None
    spoils = False

    def look_at_start(self, model: list[Any], *_: Any) -> None:
        """Plant it."""
        if os.environ["RANK"] != "1":
            return
        (chunk,) = map(unwrapped, model)
        if self.parameter:
            chunk.get_parameter(self.parameter).register_hook(self.spoil)
        else:
            hook = lambda *call: (self.spoil(call[-1][0]), *call[-1][1:])  # noqa: E731
            chunk.get_submodule(self.module).register_forward_hook(hook)

    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        """Return what is not finite, in one number of many, while step 3 is taken."""
        if not self.spoils:
            return values
        spoilt = values.clone()
        spoilt.view(-1)[5] = math.inf
        return spoilt

    def step(self, step: int, *measured: Any) -> None:
        """Begin to spoil after the second step."""
        super().step(step, *measured)
        self.spoils = step == STEP - 1 or (self.spoils and step == STEP)

    def not_taken(self, where: str, *, goes_on: bool) -> None:
        """The step is over, and what happened is looked at."""
        self.spoils = False
        super().not_taken(where, goes_on=goes_on)


class PlantingGradient(Planting):
    """In the last linear layer of the whole model's fourth layer."""

    parameter = "decoder.layers.1.mlp.linear_fc2.weight"


@pytest.mark.parametrize(
    ("watcher", "where"),
    [
        (Planting, "on rank 1 the output of decoder.layers.3.mlp.linear_fc1 is not finite"),
        (
            PlantingGradient,
            "on rank 1 the gradient of decoder.layers.3.mlp.linear_fc2.weight is not finite",
        ),
    ],
)
def test_the_rank_and_the_layer_of_the_whole_model_are_named_and_the_last_checkpoint_stays(
    tmp_path: Path, watcher: type[Recorder], where: str
) -> None:
    with pytest.raises(NotFiniteError) as raised:
        run_with(watcher, PP2, 2, tmp_path / "run")
    assert str(raised.value).startswith(f"step {STEP} is not taken: the loss is ")
    assert f"; {where}; the run stops here, its last checkpoint is " in str(raised.value)
    assert "\n" not in str(raised.value)
    assert saved(tmp_path / "run") == ["step-00000002"]
    whole = run(PP2, 2, tmp_path / "whole")
    resumed = run(changed(PP2, training={"resume": "auto"}), 2, tmp_path / "run")
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize(
    "recipe",
    [
        PP2,
        changed(
            SMALL,
            layout={"use_distributed_optimizer": True},
            training={"ddp": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
        ),
    ],
    ids=["pp2", "overlap"],
)
def test_such_a_step_can_be_skipped_and_leaves_weights_and_moments_finite(
    tmp_path: Path, recipe: Recipe
) -> None:
    recipe = changed(recipe, training={"on_not_finite": "skip", "steps": 5})
    metrics = run_with(Planting, recipe, 2, tmp_path / "run")
    assert [math.isfinite(line["loss"]) for line in metrics] == [True, True, False, True, True]
    assert [math.isfinite(norm) for norm in (line["grad_norm"] for line in metrics)] == [
        True,
        True,
        False,
        True,
        True,
    ]
    last = tmp_path / "run" / "checkpoints" / "step-00000005"
    tensors = tensors_of(last)
    assert any("exp_avg" in name for name in tensors)
    for name, tensor in tensors.items():
        assert read(last, tensor).isfinite().all(), name


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
