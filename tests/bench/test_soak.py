"""A short soak: ranks are killed at random moments, and nothing of the run is lost or changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import SMALL, changed

from mcore_lab.bench import soak as soaking
from mcore_lab.bench.soak import SoakError, soak
from mcore_lab.training import RunFolder

RECIPE = changed(
    SMALL,
    model={"transformer": {"hidden_dropout": 0.1}},
    training={"steps": 5},
    layout={"tensor_model_parallel_size": 2},
)
KILLS = 4


@pytest.mark.parametrize("in_background", [False, True])
def test_whatever_is_killed_the_run_ends_with_the_weights_of_one_left_alone(
    tmp_path: Path, in_background: bool
) -> None:
    recipe = changed(RECIPE, checkpoint={"async_save": in_background, "save_every": 1})
    result = soak(recipe, 2, KILLS, tmp_path, seed=int(in_background))
    assert result.kills == KILLS
    assert result.whole_runs >= 1
    assert result.most_steps_lost <= result.at_most_lost == (2 if in_background else 1)


def test_a_step_that_is_not_that_of_the_run_left_alone_is_found(tmp_path: Path) -> None:
    alone, killed = RunFolder(tmp_path / "alone"), RunFolder(tmp_path / "killed")
    line = {"step": 1, "loss": 4.0, "grad_norm": 1.0, "lr": 0.1}
    for folder, loss in ((alone, 4.0), (killed, 4.0000001)):
        folder.begin("", fresh=False)
        (folder.path / "metrics.jsonl").write_text(json.dumps(line | {"loss": loss}) + "\n")
    with pytest.raises(SoakError, match=r"step 1 has another loss than .*: 4.0000001, not 4.0"):
        soaking._require_same_steps(killed, alone)
