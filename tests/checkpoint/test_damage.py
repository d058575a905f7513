"""A checkpoint that cannot be used is one clear error, and leaves the run folder as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, changed, run

from mcore_lab.config import Recipe
from mcore_lab.errors import CheckpointError

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
RECIPE = changed(SMALL, training={"steps": 1})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one step, which no test changes."""
    folder = tmp_path_factory.mktemp("whole")
    run(changed(RECIPE, layout=TP2), 2, folder)
    return folder / "checkpoints" / "step-00000001"


def message_of(recipe: Recipe, folder: Path, nproc: int = 1) -> str:
    """Return why the run cannot start; it must not have left anything."""
    with pytest.raises(CheckpointError) as raised:
        run(recipe, nproc, folder / "run")
    assert not (folder / "run").exists()
    assert "Traceback" not in str(raised.value)
    return str(raised.value)


def loading(path: Path, **parts: dict[str, Any]) -> Recipe:
    return changed(RECIPE, checkpoint={"load": str(path)}, **parts)


def going_on(path: Path, **parts: dict[str, Any]) -> Recipe:
    return changed(changed(RECIPE, **parts), training={"resume": str(path), "steps": 2})


# Damage.


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.distcp"))


def truncate(file: Path, keep: int | None = None) -> None:
    """Cut a file off; of a shard little is kept, since what of it is read depends on the load."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 if keep is None else keep])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "garbage in .metadata": lambda folder: (folder / ".metadata").write_bytes(b"garbage" * 99),
    "truncated .metadata": lambda folder: truncate(folder / ".metadata"),
    "empty .metadata": lambda folder: (folder / ".metadata").write_bytes(b""),
    "no .metadata": lambda folder: (folder / ".metadata").unlink(),
    "garbage in metadata.json": lambda folder: (folder / "metadata.json").write_text("garbage"),
    "truncated shard": lambda folder: truncate(first_shard(folder), keep=64),
    "no shard": lambda folder: first_shard(folder).unlink(),
}


@pytest.mark.parametrize("start", [loading, going_on])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_checkpoint_is_one_line_that_names_it(
    whole: Path, tmp_path: Path, damage: Callable[[Path], object], start: Callable[[Path], Recipe]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    damage(copy)
    message = message_of(start(copy), tmp_path)
    assert message.startswith(f"cannot read the checkpoint {copy}: ")
    assert "\n" not in message and len(message) > len(f"cannot read the checkpoint {copy}: ")


def test_a_damaged_shard_stops_every_rank(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    truncate(first_shard(copy), keep=64)
    message = message_of(going_on(copy, layout=TP2), tmp_path, nproc=2)
    assert message.startswith(f"cannot read the checkpoint {copy}: ")


def test_an_existing_run_is_left_as_it_was(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole.parent.parent, tmp_path / "run")
    copy = tmp_path / "run" / "checkpoints" / "step-00000001"
    truncate(copy / ".metadata")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    recipe = changed(RECIPE, training={"resume": "auto", "steps": 2})
    with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
        run(recipe, 1, tmp_path / "run")
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before


# Another model.


FC1 = "decoder.layers.mlp.linear_fc1.weight"


@pytest.mark.parametrize("start", [loading, going_on])
def test_a_wider_model_is_told_apart_by_the_first_tensors_with_both_shapes(
    whole: Path, tmp_path: Path, start: Callable[..., Recipe]
) -> None:
    recipe = start(whole, model={"hidden_size": 64})
    message = message_of(recipe, tmp_path)
    assert message.startswith(f"the checkpoint {whole} is of another model: ")
    embedding = "embedding.word_embeddings.weight is (128, 32) in it and (128, 64) in this model"
    assert embedding in message
    assert message.count(" in this model") == 3 and " more)" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("model", "difference"),
    [
        ({"num_layers": 2}, "is (4, 32) in it and (2, 32) in this model"),
        ({"vocab_size": 256}, "(128, 32) in it and (256, 32) in this model"),
        ({"position_embedding_type": "rope"}, "embedding.position_embeddings.weight is in it and"),
        (
            {"share_embeddings_and_output_weights": True},
            "output_layer.weight is in it and not in this model",
        ),
        (
            {"transformer": SMALL.model.transformer | {"normalization": "RMSNorm"}},
            "layernorm.bias is in it and not in this model",
        ),
    ],
    ids=["fewer layers", "larger vocabulary", "no positions", "tied embeddings", "no biases"],
)
def test_what_differs_is_named(
    whole: Path, tmp_path: Path, model: dict[str, Any], difference: str
) -> None:
    assert difference in message_of(loading(whole, model=model), tmp_path)


def test_what_only_one_pipeline_stage_misses_is_told_by_all(whole: Path, tmp_path: Path) -> None:
    run(
        changed(RECIPE, model={"share_embeddings_and_output_weights": True}),
        1,
        tmp_path / "tied",
    )
    tied = tmp_path / "tied" / "checkpoints" / "step-00000001"
    recipe = loading(tied, layout=PP2)
    difference = "is of another model: output_layer.weight is not in it"
    assert message_of(recipe, tmp_path, nproc=2).endswith(difference)


def test_a_gated_model_is_its_own_model(tmp_path: Path) -> None:
    """Its first linear layer is cut in two in a checkpoint, and not so in the model."""
    gated = SMALL.model.transformer | {"gated_linear_unit": True, "activation_func": "silu"}
    recipe = changed(RECIPE, model={"transformer": gated})
    run(recipe, 1, tmp_path / "one")
    checkpoint = tmp_path / "one" / "checkpoints" / "step-00000001"
    metrics = run(
        changed(recipe, training={"resume": str(checkpoint), "steps": 2}), 1, tmp_path / "other"
    )
    assert [line["step"] for line in metrics] == [2]
    assert FC1 in message_of(loading(checkpoint), tmp_path)


def test_the_optimizer_of_another_precision_is_told_apart(whole: Path, tmp_path: Path) -> None:
    message = message_of(going_on(whole, training={"precision": "bf16"}), tmp_path)
    assert "optimizer.state.fp32_param" in message
