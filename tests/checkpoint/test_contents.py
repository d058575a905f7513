"""What the commands tell of a checkpoint is what is in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SMALL, changed, run

from mcore_lab.checkpoint.contents import stored_files, tensors_of
from mcore_lab.checkpoint.difference import compared
from mcore_lab.checkpoint.manifest import MANIFEST, files_in
from mcore_lab.checkpoint.read import read
from mcore_lab.cli import main
from mcore_lab.layout import ParallelLayout
from mcore_lab.runtime import launch, model_parallel

TP2 = {"tensor_model_parallel_size": 2}
RECIPE = changed(SMALL, training={"steps": 2}, checkpoint={"save_every": 1})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two ranks with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    run(changed(RECIPE, layout=TP2), 2, folder)
    return folder


def step(folder: Path, number: int) -> Path:
    return folder / "checkpoints" / f"step-0000000{number}"


def told(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """Return what a command prints as JSON."""
    capsys.readouterr()
    main(["checkpoint", *map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)


def loaded_by_megatron(path: Path) -> dict[str, torch.Tensor]:
    def on_rank() -> dict[str, torch.Tensor]:
        from megatron.core import dist_checkpointing

        with model_parallel(ParallelLayout()):
            state = dist_checkpointing.load_plain_tensors(str(path))
        return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}

    return launch(on_rank, 1, timeout=60)[0]


def test_tensors_are_read_as_megatron_core_reads_them(saved: Path) -> None:
    theirs = loaded_by_megatron(step(saved, 2))
    ours = tensors_of(step(saved, 2))
    assert ours.keys() == theirs.keys() and len(ours) > 40
    for name, tensor in ours.items():
        assert tensor.shape == tuple(theirs[name].shape)
        assert f"torch.{tensor.dtype}" == str(theirs[name].dtype)
        assert tensor.size == theirs[name].nbytes
        assert torch.equal(read(step(saved, 2), tensor), theirs[name])


def test_show_counts_parameters_by_layer_and_says_who_wrote_what(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = told(capsys, "show", saved)
    assert (shown["checkpoint"], shown["step"], shown["ranks"]) == (str(step(saved, 2)), 2, 2)
    assert shown["layout"] == {"tp": 2, "cp": 1, "pp": 1, "vpp": 1, "dp": 1, "ep": 1, "etp": 2}
    hidden, vocabulary, positions = 32, 128, 16
    norms, attention = 4 * hidden, 4 * hidden * hidden + 4 * hidden
    mlp = 2 * 4 * hidden * hidden + 5 * hidden
    layer = {"parameters": norms + attention + mlp}
    layer |= {"bytes": 4 * layer["parameters"], "optimizer_bytes": 8 * layer["parameters"]}
    assert [shown["layers"][f"decoder.layers.{number}"] for number in range(4)] == [layer] * 4
    in_all = 4 * layer["parameters"] + hidden * (2 * vocabulary + positions + 2)
    assert sum(row["parameters"] for row in shown["layers"].values()) == in_all
    assert sum(row["optimizer_bytes"] for row in shown["layers"].values()) == 8 * in_all
    sizes = {name: path.stat().st_size for name, path in files_in(step(saved, 2)).items()}
    assert {file["name"]: file["size"] for file in shown["files"]} == sizes
    ranks = {file["name"]: file["rank"] for file in shown["files"]}
    assert ranks["__1_0.distcp"] == 1 and ranks["__0_0.distcp"] == ranks[".metadata"] == 0


def test_layers_with_numbers_of_their_own_are_counted_as_well(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Experts in every second layer: layers that differ are not stacked."""
    transformer = SMALL.model.transformer | {"moe_layer_freq": 2}
    recipe = changed(
        SMALL,
        model={"num_moe_experts": 2, "transformer": transformer},
        training={"steps": 0},
    )
    run(recipe, 1, tmp_path / "run")
    layers = told(capsys, "show", tmp_path / "run")["layers"]
    counts = [layers[f"decoder.layers.{number}"]["parameters"] for number in range(4)]
    assert counts[0] == counts[2] != counts[1] == counts[3]
    assert all(row["optimizer_bytes"] == 0 for row in layers.values())


def test_a_checkpoint_without_a_manifest_is_shown_by_its_tensors(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(step(saved, 1), tmp_path / "copy")
    (tmp_path / "copy" / MANIFEST).unlink()
    shown = told(capsys, "show", tmp_path / "copy")
    assert shown["step"] is None and shown["layers"] == told(capsys, "show", saved)["layers"]
    assert {file.rank for file in stored_files(tmp_path / "copy")} == {0, 1}
    assert main(["checkpoint", "show", str(tmp_path / "copy")]) == 0
    assert "no manifest.json" in capsys.readouterr().out


def test_list_has_every_checkpoint_of_a_run_and_marks_the_latest(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (saved, saved / "checkpoints"):
        listed = told(capsys, "list", folder)
        assert [(one["step"], one["latest"]) for one in listed] == [(1, False), (2, True)]
    assert main(["checkpoint", "list", str(saved / "logs")]) == 2
    assert capsys.readouterr().err == f"error: there is no checkpoint in {saved / 'logs'}\n"


def test_prune_leaves_as_many_as_it_is_told(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(saved / "checkpoints", tmp_path / "run" / "checkpoints")
    assert main(["checkpoint", "prune", str(tmp_path / "run"), "--keep", "0"]) == 2
    done = told(capsys, "prune", tmp_path / "run", "--keep", 1)
    assert done == {
        "removed": [str(step(tmp_path / "run", 1))],
        "kept": [str(step(tmp_path / "run", 2))],
    }


def test_diff_finds_the_largest_difference_of_each_tensor(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (loaded_by_megatron(step(saved, number)) for number in (1, 2))
    for found in compared(step(saved, 1), step(saved, 2)):
        apart = (one[found.name].double() - other[found.name].double()).abs().max().item()
        assert found.largest == apart and not found.remark
    assert main(["checkpoint", "diff", str(step(saved, 1)), str(step(saved, 2))]) == 1
    assert "decoder.final_layernorm.weight" in capsys.readouterr().out


def test_diff_of_the_same_weights_on_another_layout_finds_none(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = changed(SMALL, training={"steps": 0}, checkpoint={"load": str(step(saved, 2))})
    run(recipe, 1, tmp_path / "one")
    found = told(capsys, "diff", tmp_path / "one", saved)["tensors"]
    remarks = {one["remark"] for one in found if one["name"].startswith("optimizer.")}
    assert remarks == {"only in B"}
    weights = [one for one in found if not one["name"].startswith("optimizer.")]
    assert len(weights) > 15 and all(one["largest"] == 0 for one in weights)


@pytest.mark.parametrize("command", ["show", "list", "verify", "prune --keep 5"])
def test_what_reads_no_tensor_imports_no_torch(saved: Path, command: str) -> None:
    program = (
        "import sys; from mcore_lab.cli import main; "
        f"status = main(['checkpoint', *{command.split()}, {str(saved)!r}]); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
