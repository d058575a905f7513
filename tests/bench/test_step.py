"""The benchmark of a step runs all loops for real; what it measures is not a test's to judge."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from small_runs import SMALL, changed

from mcore_lab.bench import step
from mcore_lab.bench.peers import why_none
from mcore_lab.bench.step import BARE, PEERS, RECIPE, StepTimes, measure_on_rank
from mcore_lab.config import Recipe
from mcore_lab.errors import LabError
from mcore_lab.recipes import load_recipe
from mcore_lab.runtime import launch

TP2 = changed(SMALL, training={"steps": 4}, layout={"tensor_model_parallel_size": 2})


def test_every_loop_takes_the_steps_that_are_timed_and_has_the_recipes_losses() -> None:
    for times in launch(measure_on_rank, 2, TP2, 2, timeout=120):
        assert isinstance(times, StepTimes)
        assert times.steps == 2 * 1
        assert list(times.seconds) == [RECIPE, BARE, *PEERS]
        for name, ratio in times.ratios.items():
            assert ratio == pytest.approx(times.seconds[RECIPE] / times.seconds[name])
        assert times.losses_apart.keys() == times.ratios.keys() == {BARE, *PEERS}
        assert max(times.losses_apart.values()) < 2e-6
        assert 0 < times.loss < 10 and times.no_peers is None


def test_weight_decay_and_a_clipped_norm_are_the_same_in_every_loop() -> None:
    recipe = changed(TP2, training={"weight_decay": 1.0, "clip_grad": 0.5, "adam_beta2": 0.95})
    times = launch(measure_on_rank, 2, recipe, 1, timeout=120)[0]
    assert max(times.losses_apart.values()) < 2e-6


def test_a_loop_that_computes_something_else_is_not_timed_beside_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = changed(TP2, training={"lr": 2e-2})
    (name, train), *_ = PEERS.items()
    monkeypatch.setitem(step.PEERS, name, lambda recipe, *rest: train(other, *rest))
    with pytest.raises(LabError, match=rf"the loop {name} does not compute what the recipe does"):
        launch(measure_on_rank, 2, TP2, 1, timeout=120)


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (load_recipe("tp2_gpt"), None),
        (load_recipe("dp2_gpt"), "its layout splits more than tensors"),
        (load_recipe("sp2_gpt"), "its layout splits more than tensors"),
        (changed(TP2, model={"position_embedding_type": "rope"}), "its model is more than a dense"),
        (replace(TP2, model=replace(TP2.model, transformer={})), "its model is more than a dense"),
        (changed(TP2, training={"precision": "bf16"}), "it trains with more than Adam in fp32"),
        (changed(TP2, training={"clip_grad": 0.0}), "it trains with more than Adam in fp32"),
    ],
)
def test_what_the_peers_lack_of_a_recipe_is_said(recipe: Recipe, why: str | None) -> None:
    found = why_none(recipe, 2)
    assert found is None if why is None else found is not None and found.startswith(why)


def test_a_recipe_without_peers_is_timed_beside_megatron_core_alone() -> None:
    recipe = changed(SMALL, training={"steps": 4})
    times = launch(measure_on_rank, 2, recipe, 1, timeout=120)[0]
    assert list(times.seconds) == [RECIPE, BARE]
    assert times.no_peers == "its layout splits more than tensors"


def test_a_benchmark_that_there_is_not_is_told_in_a_line() -> None:
    words = [sys.executable, "-m", "mcore_lab", "bench", "stpe", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: no benchmark stpe; did you mean step?\n"
    assert json.loads(done.stdout) == {"error": "no benchmark stpe; did you mean step?"}
