"""A run that goes on from a checkpoint goes on as if it had never stopped, on any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, changed, losses, run

from mcore_lab.config import Recipe
from mcore_lab.errors import CheckpointError

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}

# The rate depends on the step: a schedule that began again would show in the losses.
RECIPE = changed(
    SMALL,
    training={
        "lr_warmup_steps": 1,
        "lr_decay_style": "cosine",
        "lr_decay_steps": 8,
        "min_lr": 1e-3,
        "weight_decay": 0.1,
    },
    checkpoint={"save_every": 2},
)

RUNS: dict[str, tuple[int, dict[str, Any], str]] = {
    "one rank": (1, {}, "fp32"),
    "one rank, bf16": (1, {}, "bf16"),
    "tp2": (2, TP2, "fp32"),
    "tp2 sp, bf16": (2, TP2 | {"sequence_parallel": True}, "bf16"),
    "dp2 distributed optimizer": (2, SHARDED, "fp32"),
    "dp2 distributed optimizer, bf16": (2, SHARDED, "bf16"),
    "pp2 interleaved": (2, PP2 | {"virtual_pipeline_model_parallel_size": 2}, "fp32"),
}


def until(steps: int, recipe: Recipe = RECIPE, **parts: dict[str, Any]) -> Recipe:
    training = {"steps": steps, **parts.pop("training", {})}
    return changed(recipe, training=training, **parts)


def going_on(steps: int, recipe: Recipe = RECIPE, **parts: dict[str, Any]) -> Recipe:
    return until(steps, changed(recipe, training={"resume": "auto"}), **parts)


@pytest.mark.parametrize("name", RUNS)
def test_steps_before_and_after_a_stop_have_the_losses_of_one_go(tmp_path: Path, name: str) -> None:
    nproc, layout, precision = RUNS[name]
    recipe = changed(RECIPE, layout=layout, training={"precision": precision})
    whole = run(until(4, recipe), nproc, tmp_path / "whole")
    middle = tmp_path / "whole" / "checkpoints" / "step-00000002"
    after = run(until(4, recipe, training={"resume": str(middle)}), nproc, tmp_path / "after")
    assert [line["step"] for line in after] == [3, 4]
    assert losses(after) == pytest.approx(losses(whole)[2:], rel=1e-6)
    assert [line["lr"] for line in after] == [line["lr"] for line in whole][2:]


def test_a_run_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    whole = run(until(4), 1, tmp_path / "whole")
    run(until(2), 1, tmp_path / "stopped")
    stopped = run(going_on(4), 1, tmp_path / "stopped")
    assert [line["step"] for line in stopped] == [1, 2, 3, 4]
    assert losses(stopped) == pytest.approx(losses(whole), rel=1e-6)


def test_a_run_goes_on_from_two_ranks_to_one_and_back(tmp_path: Path) -> None:
    whole = run(until(6), 1, tmp_path / "whole")
    for steps, nproc, layout in [(2, 2, TP2), (4, 1, {}), (6, 2, TP2)]:
        metrics = run(going_on(steps, layout=layout), nproc, tmp_path / "moved")
        assert losses(metrics) == pytest.approx(losses(whole)[:steps], rel=1e-5)


def test_the_distributed_optimizer_goes_on_on_any_layout(tmp_path: Path) -> None:
    whole = run(until(8), 1, tmp_path / "whole")
    layouts = [(2, SHARDED), (2, SHARDED | TP2), (2, SHARDED | PP2), (1, SHARDED)]
    for part, (nproc, layout) in enumerate(layouts, start=1):
        metrics = run(going_on(2 * part, layout=layout), nproc, tmp_path / "moved")
        assert losses(metrics) == pytest.approx(losses(whole)[: 2 * part], rel=1e-5)


def test_a_run_goes_on_with_the_rate_that_its_recipe_says_now(tmp_path: Path) -> None:
    run(until(2), 1, tmp_path / "run")
    recipe = changed(RECIPE, training={"lr_decay_style": "constant", "lr": 0.5, "min_lr": 0.25})
    metrics = run(going_on(4, recipe), 1, tmp_path / "run")
    assert [line["lr"] for line in metrics][2:] == [0.5, 0.5]


def test_a_run_that_has_no_checkpoint_yet_begins(tmp_path: Path) -> None:
    metrics = run(going_on(2), 1, tmp_path / "run")
    assert [line["step"] for line in metrics] == [1, 2]


def test_a_run_that_has_taken_all_its_steps_takes_no_more(tmp_path: Path) -> None:
    before = run(until(2), 1, tmp_path / "run")
    assert run(going_on(2), 1, tmp_path / "run") == before


def test_a_run_of_no_steps_writes_its_initial_weights_to_begin_with(tmp_path: Path) -> None:
    whole = run(until(2), 1, tmp_path / "whole")
    assert run(until(0), 1, tmp_path / "run") == []
    assert (tmp_path / "run" / "checkpoints" / "step-00000000").is_dir()
    other_seed = changed(RECIPE, training={"seed": 1})
    assert losses(run(until(2, other_seed), 1, tmp_path / "seed"))[0] != losses(whole)[0]
    metrics = run(going_on(2), 1, tmp_path / "run")
    assert losses(metrics) == pytest.approx(losses(whole), rel=1e-6)


def test_weights_alone_are_loaded_into_a_run_that_begins(tmp_path: Path) -> None:
    run(until(2), 1, tmp_path / "first")
    weights = changed(RECIPE, checkpoint={"load": str(tmp_path / "first")})
    begun = run(until(2, weights), 1, tmp_path / "begun")
    assert [line["step"] for line in begun] == [1, 2]
    assert begun[0]["lr"] == 0.0
    # A checkpoint that holds these weights and no optimizer leads to the same run.
    run(until(0, weights), 1, tmp_path / "weights")
    bare = changed(RECIPE, training={"resume": str(tmp_path / "weights")})
    assert losses(run(until(2, bare), 1, tmp_path / "bare")) == losses(begun)
    assert losses(begun) != pytest.approx(losses(run(until(2), 1, tmp_path / "new")), rel=1e-4)


def test_bf16_takes_weights_of_fp32(tmp_path: Path) -> None:
    run(until(2), 1, tmp_path / "fp32")
    weights = changed(RECIPE, checkpoint={"load": str(tmp_path / "fp32")})
    fp32 = run(until(2, weights), 1, tmp_path / "one")
    bf16 = run(until(2, weights, training={"precision": "bf16"}), 1, tmp_path / "other")
    assert losses(bf16) == pytest.approx(losses(fp32), rel=1e-2)


@pytest.mark.parametrize("saved", [True, False])
def test_an_optimizer_of_another_kind_is_refused_with_the_ways_on(
    tmp_path: Path, saved: bool
) -> None:
    run(until(2, layout={"use_distributed_optimizer": saved}), 1, tmp_path / "run")
    with pytest.raises(CheckpointError) as raised:
        other = {"use_distributed_optimizer": not saved}
        run(going_on(4, layout=other), 1, tmp_path / "run")
    message = str(raised.value)
    assert f"was saved {'with' if saved else 'without'} the distributed optimizer" in message
    assert f"--layout.use-distributed-optimizer {saved} to go on from it" in message
    assert "--checkpoint.load to take its weights alone" in message
