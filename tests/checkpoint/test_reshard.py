"""A checkpoint is written anew for another layout, and is the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from contents import common_of, differences
from small_runs import SMALL, changed, losses, run

from mcore_lab import cli
from mcore_lab.errors import CheckpointError, LayoutError
from mcore_lab.recipes.carried import recipe_in
from mcore_lab.recipes.reshard import reshard

TP2 = {"tensor_model_parallel_size": 2}
TP3 = {"tensor_model_parallel_size": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on one rank, with its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    run(changed(SMALL, training={"steps": 2}), 1, folder)
    return folder


def step_2(folder: Path) -> Path:
    return folder / "step-00000002"


def written_by(checkpoint: Path) -> set[str]:
    return {file.name.split("_")[2] for file in checkpoint.glob("__*.distcp")}


def test_it_holds_the_same_and_a_run_goes_on_from_it(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = step_2(trained / "checkpoints")
    words = [
        "checkpoint",
        "reshard",
        str(trained),
        str(tmp_path / "tp2"),
        "--tp",
        "2",
        "--nproc",
        "2",
    ]
    assert cli.main(words) == 0
    written = step_2(tmp_path / "tp2")
    assert capsys.readouterr().out == f"checkpoint {written}, of 2 ranks\n"
    assert written_by(source) == {"0"} and written_by(written) == {"0", "1"}
    # Random states are of ranks, which are others.
    assert [key for key in differences(source, written) if "rng_state" not in key] == []
    assert common_of(written)["consumed_train_samples"] == 2 * 8
    assert recipe_in(written).layout.tp == 2

    resume = {"steps": 4, "resume": str(tmp_path / "tp2")}
    after = run(changed(SMALL, layout=TP2, training=resume), 2, tmp_path / "after")
    alone = run(changed(SMALL, training=resume | {"resume": str(trained)}), 1, tmp_path / "alone")
    assert losses(after) == pytest.approx(losses(alone), rel=1e-5)


def test_what_cannot_be_done_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    source = step_2(trained / "checkpoints")
    recipe = recipe_in(source)
    with pytest.raises(LayoutError, match="num_attention_heads"):
        reshard(source, tmp_path / "new", changed(recipe, layout=TP3), 3)
    wider = changed(recipe, model={"hidden_size": 64})
    with pytest.raises(CheckpointError, match="is of another model"):
        reshard(source, tmp_path / "new", wider, 1)
    assert not list(tmp_path.rglob("step-*"))
    (tmp_path / "there" / "step-00000002").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="there is a checkpoint at"):
        reshard(source, tmp_path / "there", recipe, 1)
