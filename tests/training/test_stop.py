"""A run that a signal stops saves after its step, and goes on as if it had not stopped."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from small_runs import SMALL, changed, launched_run, losses, run
from watching import Recorder, run_with

from mcore_lab.checkpoint.integrity import differences
from mcore_lab.config import RunArguments
from mcore_lab.errors import PreemptedError, RankFailedError
from mcore_lab.recipes.start import run_rank

TP2 = {"tensor_model_parallel_size": 2}
RECIPE = changed(
    SMALL, model={"transformer": {"hidden_dropout": 0.1}}, training={"steps": 5}, layout=TP2
)


class SignalledInStep3(Recorder):
    """Its rank 1 is told to stop while it takes its third step."""

    number = signal.SIGUSR1

    def look_at_gradients(self, step: int, *seen: Any) -> None:
        """Between the backward pass and the optimizer's step."""
        if step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), self.number)


class Terminated(SignalledInStep3):
    """By the other signal."""

    number = signal.SIGTERM


@pytest.mark.parametrize("watcher", [SignalledInStep3, Terminated])
def test_the_signal_of_one_rank_stops_all_after_the_step_and_nothing_is_lost(
    tmp_path: Path, watcher: type[Recorder]
) -> None:
    with pytest.raises(PreemptedError, match=r"after step 3, .*/step-00000003: --training.resume"):
        run_with(watcher, RECIPE, 2, tmp_path / "run")
    assert differences(tmp_path / "run" / "checkpoints" / "step-00000003") == []
    metrics = run(changed(RECIPE, training={"resume": "auto"}), 2, tmp_path / "run")
    assert losses(metrics) == losses(run(RECIPE, 2, tmp_path / "whole"))


class KilledAtTheFirstGroup:
    """Rank 0 is killed where the other waits for it in C++."""

    def __init__(self, **sizes: int) -> None:
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        dist.new_group([0, 1])


def test_a_rank_that_is_killed_before_the_first_step_is_not_waited_for(tmp_path: Path) -> None:
    """The launcher gives the others 30 seconds to heed the SIGTERM that it sends them."""

    def rank(arguments: RunArguments) -> None:
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel = KilledAtTheFirstGroup
        run_rank(arguments)

    started = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 0 was killed by SIGKILL"):
        launched_run(rank, RECIPE, 2, tmp_path / "run")
    assert time.monotonic() - started < 20


def test_without_checkpoints_it_stops_all_the_same_and_says_so(tmp_path: Path) -> None:
    recipe = changed(RECIPE, checkpoint={"save": False})
    with pytest.raises(PreemptedError, match=r"after step 3, without a checkpoint"):
        run_with(SignalledInStep3, recipe, 2, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_that_ends_with_that_step_has_not_been_stopped(tmp_path: Path) -> None:
    metrics = run_with(
        SignalledInStep3, changed(RECIPE, training={"steps": 3}), 2, tmp_path / "run"
    )
    assert len(metrics) == 3
