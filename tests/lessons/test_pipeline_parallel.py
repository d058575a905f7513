"""The lesson's pipeline trains as Megatron-Core's does, and each schedule holds what it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mcore_lab import cpu
from mcore_lab.errors import ConfigError
from mcore_lab.layout import ParallelLayout
from mcore_lab.lessons.data_parallel import deep_mlp
from mcore_lab.lessons.pipeline_parallel import SCHEDULES, Settings, Stage, lesson
from mcore_lab.lessons.pipeline_timeline import drawn, in_slots
from mcore_lab.lessons.start import give
from mcore_lab.runtime import launch, model_parallel

cpu.preload()

from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.pipeline_parallel.schedules import (  # noqa: E402
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

SMALL = Settings(num_layers=4, hidden_size=16, num_microbatches=5, micro_batch_size=3)
Losses, Gradients = list[float], list[Tensor]


class MegatronStage(MegatronModule):
    """A stage as Megatron-Core's schedules want it, of the lesson's own layers."""

    def __init__(self, config: TransformerConfig, layers: torch.nn.Module) -> None:
        super().__init__(config)
        self.layers = layers
        self.model_type = ModelType.encoder_or_decoder
        self.arrived: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Take the activations `[b, 1, h]` of the stage before; the first stage gets None."""
        [self.arrived] = tensors

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the activations `[b, 1, h]` of the micro-batch."""
        return self.layers(inputs if self.arrived is None else self.arrived)


def of_megatron_core(layers: torch.nn.Module, data: Tensor) -> tuple[Losses, Gradients]:
    """Run the data `[2, m, b, h]`, inputs and targets, through Megatron-Core's 1F1B."""

    def forward_step(batches: Any, model: MegatronStage) -> tuple[Tensor, Any]:
        inputs, targets = (x.unsqueeze(1) for x in next(batches))

        def loss_of(output: Tensor) -> tuple[Tensor, dict[str, float]]:
            loss = torch.nn.functional.mse_loss(output, targets)
            return loss, {"loss": loss.item()}

        return model(inputs), loss_of

    config = TransformerConfig(
        num_layers=SMALL.num_layers,
        hidden_size=SMALL.hidden_size,
        num_attention_heads=1,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
    )
    reported = forward_backward_pipelining_without_interleaving(
        forward_step_func=forward_step,
        data_iterator=zip(*data, strict=True),
        model=MegatronStage(config, layers),
        num_microbatches=SMALL.num_microbatches,
        seq_length=SMALL.micro_batch_size,
        micro_batch_size=1,
    )
    return [report["loss"] for report in reported], gradients_of(layers)


def gradients_of(layers: torch.nn.Module) -> Gradients:
    return [parameter.grad.clone() for parameter in layers.parameters()]


def two_stages() -> dict[str, tuple[Losses, Gradients]]:
    """Return what a rank's stage computes: with both schedules, in Megatron-Core, and alone."""
    found = {}
    with model_parallel(ParallelLayout(pipeline_model_parallel_size=2)) as world:
        # Two layers a stage, each of two modules.
        mine = slice(4 * world.rank, 4 * world.rank + 4)
        layers, whole = (deep_mlp(SMALL.num_layers, SMALL.hidden_size, 7) for _ in range(2))
        layers = layers[mine]
        shape = 2, SMALL.num_microbatches, SMALL.micro_batch_size, SMALL.hidden_size
        data = torch.randn(shape, generator=torch.Generator().manual_seed(7))
        ways = [torch.distributed.new_group() for _ in range(2)]
        for name, schedule in SCHEDULES.items():
            layers.zero_grad()
            stage = Stage(layers, *data, ways)
            schedule(stage, SMALL.num_microbatches)
            stage.finish()
            found[name] = (
                [loss * SMALL.num_microbatches for loss in stage.losses],
                gradients_of(layers),
            )
        layers.zero_grad()
        found["Megatron-Core"] = of_megatron_core(layers, data)
        of_each = (whole(data[0]) - data[1]).square().mean((1, 2))
        of_each.mean().backward()
        found["one rank"] = of_each.tolist() if world.rank == 1 else [], gradients_of(whole[mine])
    return found


@pytest.fixture(scope="module")
def stages() -> list[dict[str, tuple[Losses, Gradients]]]:
    return launch(two_stages, 2, timeout=60)


@pytest.mark.parametrize("reference", ["Megatron-Core", "one rank"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_both_stages_have_the_losses_and_gradients_of(
    reference: str, schedule: str, stages: list[dict[str, tuple[Losses, Gradients]]]
) -> None:
    for rank, found in enumerate(stages):
        (losses, gradients), (expected_losses, expected) = found[schedule], found[reference]
        assert len(losses) == (SMALL.num_microbatches if rank == 1 else 0)
        assert losses == pytest.approx(expected_losses, rel=1e-6)
        for ours, theirs in zip(gradients, expected, strict=True):
            assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


# What the lesson shows.


def shown(ranks: int, **settings: int) -> dict[str, Any]:
    """Return what the lesson finds on small layers."""
    small = Settings(**{"num_layers": 4, "hidden_size": 32, "micro_batch_size": 16} | settings)
    found = launch(give, ranks, lesson, small, True, timeout=60, megatron_core=False)[0]
    assert found
    return found


@pytest.fixture(scope="module")
def of_four_stages() -> dict[str, Any]:
    return shown(4, num_microbatches=6)


def column(found: dict[str, Any], schedule: str, name: str) -> list[Any]:
    return [stage[name] for stage in found[schedule]["stages"]]


def test_gpipe_holds_every_micro_batch_and_1f1b_as_many_as_there_are_stages_to_come(
    of_four_stages: dict[str, Any],
) -> None:
    assert column(of_four_stages, "GPipe", "micro-batches held") == [6, 6, 6, 6]
    assert column(of_four_stages, "1F1B", "micro-batches held") == [4, 3, 2, 1]
    peaks = [column(of_four_stages, schedule, "peak MiB") for schedule in ("1F1B", "GPipe")]
    assert all(held < all_held for held, all_held in zip(*peaks, strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bubble_of_what_ran_is_that_of_the_formula(
    of_four_stages: dict[str, Any], schedule: str
) -> None:
    assert of_four_stages[schedule]["bubble"] == pytest.approx(3 / (6 + 3))
    assert all(0 <= share < 1 for share in column(of_four_stages, schedule, "idle time"))
    assert max(column(of_four_stages, schedule, "gradients off by")) < 1e-6


def test_the_timeline_is_the_order_that_stages_ran_in(of_four_stages: dict[str, Any]) -> None:
    assert drawn(of_four_stages["1F1B"]["slots"]) == (
        "stage 0  F0 F1 F2 F3 .  .  .  B0 F4 B1 F5 B2 .  B3 .  B4 .  B5\n"
        "stage 1  .  F0 F1 F2 .  .  B0 F3 B1 F4 B2 F5 B3 .  B4 .  B5 .\n"
        "stage 2  .  .  F0 F1 .  B0 F2 B1 F3 B2 F4 B3 F5 B4 .  B5 .  .\n"
        "stage 3  .  .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 .  .  ."
    )


def test_fewer_micro_batches_than_stages_and_one_stage_are_pipelines_too() -> None:
    few, alone = shown(4, num_microbatches=2), shown(1, num_microbatches=3)
    assert column(few, "1F1B", "micro-batches held") == [2, 2, 2, 1]
    assert few["1F1B"]["bubble"] == few["GPipe"]["bubble"] == pytest.approx(3 / (2 + 3))
    assert alone["1F1B"]["slots"] == [["F0", "B0", "F1", "B1", "F2", "B2"]]
    for found in (few, alone):
        assert max(column(found, "1F1B", "gradients off by")) < 1e-6


def test_layers_that_stages_cannot_share_evenly_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="3 stages cannot share --num-layers 4 evenly; 6 would do"
    ):
        shown(3)


def test_passes_that_wait_for_each_other_have_no_timeline() -> None:
    with pytest.raises(
        ValueError, match=r"wait for each other: \[\['B0', 'F0'\], \['F0', 'B0'\]\]"
    ):
        in_slots([["B0", "F0"], ["F0", "B0"]])
