"""Where a run goes on: in its own folder, from another's checkpoint, or with weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, changed, losses, run

from mcore_lab.config import Recipe

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


def until(steps: int, recipe: Recipe = RECIPE, **parts: dict[str, Any]) -> Recipe:
    training = {"steps": steps, **parts.pop("training", {})}
    return changed(recipe, training=training, **parts)


def going_on(steps: int, recipe: Recipe = RECIPE, **parts: dict[str, Any]) -> Recipe:
    return until(steps, changed(recipe, training={"resume": "auto"}), **parts)


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
    assert losses(bf16) == pytest.approx(losses(fp32), rel=2e-3)
