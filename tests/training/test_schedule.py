"""The learning rate's course, step by step, against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mcore_lab.config import Data, Recipe, Training
from mcore_lab.errors import ConfigError
from mcore_lab.training.optimizer import lr_scheduler
from mcore_lab.training.rules import require_trainable

HALF = 0.5 + 0.5 * math.cos(math.pi / 2)


def rates(**values: Any) -> list[float]:
    """Return the rate that each step of the run is taken with."""
    training = Training(**values)
    adam: Any = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    scheduler = lr_scheduler(training, adam)
    taken = []
    for _ in range(training.steps):
        taken.append(adam.param_groups[0]["lr"])
        scheduler.step(increment=1)
    return taken


def test_constant_is_constant() -> None:
    assert rates(steps=4, lr=0.1) == [0.1, 0.1, 0.1, 0.1]


def test_warm_up_rises_from_0_by_equal_steps() -> None:
    expected = [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(steps=7, lr=1.0, lr_warmup_steps=4) == pytest.approx(expected)


def test_a_warm_up_longer_than_the_run_is_cut_off() -> None:
    expected = [0.0, 0.1, 0.2]
    assert rates(steps=3, lr=1.0, lr_warmup_steps=10) == pytest.approx(expected)


def test_cosine_falls_from_the_end_of_warm_up_to_the_least_at_the_last_step() -> None:
    taken = rates(
        steps=10, lr=1.0, min_lr=0.2, lr_warmup_steps=2, lr_decay_style="cosine", lr_decay_steps=6
    )
    quarter, three_quarters = (0.5 + 0.5 * math.cos(math.pi * part) for part in (0.25, 0.75))
    decay = [0.2 + 0.8 * part for part in (quarter, HALF, three_quarters, 0.0)]
    assert taken == pytest.approx([0.0, 0.5, 1.0, *decay, 0.2, 0.2, 0.2])


def test_linear_falls_by_equal_steps_over_the_whole_run_if_not_told_when_to_end() -> None:
    expected = [1.0, 0.75, 0.5, 0.25]
    assert rates(steps=4, lr=1.0, lr_decay_style="linear") == pytest.approx(expected)


def test_inverse_square_root_goes_on_from_the_warm_up() -> None:
    taken = rates(steps=10, lr=1.0, lr_warmup_steps=4, lr_decay_style="inverse-square-root")
    assert taken[5:] == pytest.approx([math.sqrt(4 / step) for step in range(5, 10)])


def test_wsd_is_stable_and_decays_over_the_last_fifth() -> None:
    taken = rates(steps=20, lr=1.0, lr_decay_style="WSD")
    assert taken[:17] == [1.0] * 17
    decay = [0.5 + 0.5 * math.cos(math.pi * part) for part in (0.25, 0.5, 0.75)]
    assert taken[17:] == pytest.approx(decay)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": -1}, "--training.steps must not be below 0; it is -1"),
        ({"seed": -1}, "--training.seed must not be below 0; it is -1"),
        ({"lr": -0.1, "min_lr": -0.2}, "--training.lr must not be below 0; it is -0.1"),
        ({"lr": math.nan}, "--training.lr must not be below 0; it is nan"),
        ({"lr": 0.1, "min_lr": 0.2}, "--training.min-lr 0.2 is above --training.lr 0.1"),
        (
            {"lr_warmup_steps": 5, "lr_decay_steps": 5},
            "--training.lr-warmup-steps 5 must be below --training.lr-decay-steps 5",
        ),
        ({"adam_beta2": 1.0}, "--training.adam-beta2 must be below 1; it is 1.0"),
        ({"peak_tflops": 0.0}, "--training.peak-tflops must be above 0; it is 0.0"),
        ({"eval_every": 0}, "--training.eval-every must not be below 1; it is 0"),
    ],
)
def test_numbers_that_no_run_can_have_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        require_trainable(Recipe(name="x", training=Training(**values)))
    assert message in str(raised.value).splitlines()


def test_all_that_is_wrong_is_said_at_once() -> None:
    training = Training(steps=-1, clip_grad=-1.0, min_lr=1.0)
    with pytest.raises(ConfigError) as raised:
        require_trainable(Recipe(name="x", training=training))
    assert len(str(raised.value).splitlines()) == 3


@pytest.mark.parametrize("split", ["95,5,0", "1", "0.9, 0.1", "100,0,0", "1,.5"])
def test_shares_of_the_data_can_be_written_in_any_proportion(split: str) -> None:
    require_trainable(Recipe(name="x", data=Data(split=split)))


@pytest.mark.parametrize("split", ["", "a", "0,1,1", "1,2,3,4", "-1,2", "95;5;0", "95,,5"])
def test_shares_that_say_nothing_are_refused(split: str) -> None:
    with pytest.raises(ConfigError, match="is not the shares of training, validation and test"):
        require_trainable(Recipe(name="x", data=Data(split=split)))
