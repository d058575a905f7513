"""The benchmark of checkpoints saves and loads for real; its times are not a test's to judge."""

from __future__ import annotations

import os
import time
from pathlib import Path

from small_runs import SMALL, changed

from mcore_lab.bench import checkpoint
from mcore_lab.bench.checkpoint import CheckpointTimes, measure_on_rank
from mcore_lab.config import Recipe
from mcore_lab.runtime import launch


def test_a_checkpoint_with_the_optimizer_is_saved_and_loaded_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    recipe = changed(SMALL, layout={"tensor_model_parallel_size": 2})
    for times in launch(measure_on_rank, 2, recipe, 2, tmp_path, timeout=120):
        assert isinstance(times, CheckpointTimes)
        assert times.rounds == 2
        assert times.size > 3 * 59584 * 4
        assert times.save_seconds > 0 < times.load_seconds
        assert times.blocked_seconds > 0 < times.disk_seconds
    assert not list(tmp_path.iterdir())


def test_rank_0_keeps_the_checkpoints_until_every_rank_has_seen_their_size(tmp_path: Path) -> None:
    sizes = launch(_measure_with_a_late_rank_1, 2, SMALL, tmp_path, timeout=120)
    assert sizes[0] == sizes[1] > 0


def _measure_with_a_late_rank_1(recipe: Recipe, folder: Path) -> int:
    files_in = checkpoint.files_in

    def files_in_late(of: Path) -> dict[str, Path]:
        if os.environ["RANK"] == "1":
            time.sleep(1)
        return files_in(of)

    checkpoint.files_in = files_in_late
    return measure_on_rank(recipe, 1, folder).size
