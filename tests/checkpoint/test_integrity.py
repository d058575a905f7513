"""A checkpoint whose files are not those that were saved is told by the file that is not."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from small_runs import SMALL, changed, run

from mcore_lab.checkpoint.integrity import differences
from mcore_lab.checkpoint.manifest import MANIFEST, files_in, read_manifest
from mcore_lab.cli import main
from mcore_lab.errors import CheckpointError

TP2 = {"tensor_model_parallel_size": 2}
RECIPE = changed(SMALL, training={"steps": 2}, checkpoint={"save_every": 1})
FLIPS = 300


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run's checkpoints, of steps 1 and 2, which no test changes."""
    folder = tmp_path_factory.mktemp("saved")
    run(changed(RECIPE, layout=TP2), 2, folder)
    return folder / "checkpoints"


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage, with another beside it."""
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints" / "step-00000002"


def shard(folder: Path) -> Path:
    return folder / "__1_0.distcp"


# What the manifest says.


def test_the_manifest_names_every_file_with_its_size_and_the_rank_that_wrote_it(
    saved: Path,
) -> None:
    manifest = read_manifest(saved / "step-00000002")
    assert manifest is not None
    assert manifest.step == 2 and manifest.world_size == 2
    assert (manifest.layout["tp"], manifest.layout["pp"], manifest.layout["dp"]) == (2, 1, 1)
    assert set(manifest.versions) == {"mcore_lab", "megatron-core", "torch", "python"}
    files = files_in(saved / "step-00000002")
    assert manifest.files.keys() == files.keys()
    for name, file in manifest.files.items():
        assert file.size == files[name].stat().st_size
        assert file.rank == (int(name[2]) if name.endswith(".distcp") else 0)


def test_a_checkpoint_as_it_was_saved_is_verified(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert differences(saved / "step-00000001") == []
    assert main(["checkpoint", "verify", str(saved.parent)]) == 0
    assert "step-00000002: " in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(saved / "step-00000001"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and told["differences"] == [] and told["bytes"] > 1e5


# What is found.


def test_every_flip_of_one_byte_in_any_file_is_found_and_the_file_is_named(copy: Path) -> None:
    drawn = random.Random(20)
    files = [*sorted(files_in(copy)), MANIFEST]
    flips = [drawn.choice(files) for _ in range(FLIPS)]
    assert Counter(flips).keys() == set(files)
    for name in flips:
        content = bytearray((copy / name).read_bytes())
        place, bits = drawn.randrange(len(content)), drawn.randrange(1, 256)
        content[place] ^= bits
        (copy / name).write_bytes(content)
        try:
            found = differences(copy)
        except CheckpointError as error:
            found = [str(error)]
            assert name == MANIFEST and "manifest.json is damaged" in found[0]
        assert len(found) == 1 and name in found[0], (name, place, bits)
        content[place] ^= bits
        (copy / name).write_bytes(content)
    assert differences(copy) == []


def test_a_truncated_a_missing_and_an_extra_file_are_each_named_in_a_line(copy: Path) -> None:
    size = shard(copy).stat().st_size
    shard(copy).write_bytes(shard(copy).read_bytes()[:-1])
    (copy / "metadata.json").unlink()
    (copy / "__2_0.distcp").write_bytes(b"more")
    assert sorted(differences(copy)) == [
        f"__1_0.distcp has {size - 1:,} bytes in place of {size:,}",
        "__2_0.distcp is not of this checkpoint",
        "metadata.json is missing",
    ]


def test_a_shard_of_another_save_is_named_with_the_save_that_it_is_of(copy: Path) -> None:
    other = copy.with_name("step-00000001")
    shutil.copy(shard(other), shard(copy))
    origin = "__1_0.distcp is __1_0.distcp of another save, step-00000001"
    assert differences(copy) == [origin]
    shutil.rmtree(other)
    assert differences(copy) == [
        "__1_0.distcp is damaged: its SHA-256 is not that of what was saved"
    ]


def test_ranks_that_share_the_work_find_together_what_one_finds(copy: Path) -> None:
    shard(copy).unlink()
    (copy / ".metadata").write_bytes(b"")
    (copy / "more").touch()
    alone = differences(copy)
    assert len(alone) == 3
    for ranks in (2, 3, 20):
        shared = [line for rank in range(ranks) for line in differences(copy, rank, ranks)]
        assert sorted(shared) == sorted(alone)


def test_the_command_prints_what_differs_and_returns_1(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "metadata.json").unlink()
    shard(copy).unlink()
    assert main(["checkpoint", "verify", str(copy)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{copy} is not as it was saved:"
    assert sorted(lines[1:]) == ["  __1_0.distcp is missing", "  metadata.json is missing"]


def test_the_command_says_so_where_there_is_no_manifest(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / MANIFEST).unlink()
    assert main(["checkpoint", "verify", str(copy)]) == 2
    told = f"error: the checkpoint {copy} has no manifest.json to hold its files against\n"
    assert capsys.readouterr().err == told


# What a load does about it.


def flip_a_weight(folder: Path) -> None:
    """Change a byte in the middle of a shard, where nothing but numbers are."""
    content = bytearray(shard(folder).read_bytes())
    content[len(content) // 2] ^= 1
    shard(folder).write_bytes(content)


@pytest.mark.parametrize("part", ["training", "checkpoint"])
def test_a_load_refuses_a_flipped_byte_on_every_rank(copy: Path, part: str, tmp_path: Path) -> None:
    flip_a_weight(copy)
    start = {"resume": str(copy)} if part == "training" else {"load": str(copy)}
    recipe = changed(changed(RECIPE, training={"steps": 3}), **{part: start})
    with pytest.raises(CheckpointError) as raised:
        run(changed(recipe, layout=TP2), 2, tmp_path / "run")
    reason = "__1_0.distcp is damaged: its SHA-256 is not that of what was saved"
    assert str(raised.value) == f"cannot read the checkpoint {copy}: {reason}"


def test_a_flipped_byte_is_loaded_where_files_are_not_verified(copy: Path, tmp_path: Path) -> None:
    """Megatron-Core itself sees nothing of it."""
    flip_a_weight(copy)
    recipe = changed(
        changed(RECIPE, training={"steps": 3}),
        training={"resume": str(copy)},
        checkpoint={"verify": "off"},
    )
    assert [line["step"] for line in run(recipe, 1, tmp_path / "run")] == [3]


def test_a_checkpoint_without_a_manifest_is_loaded(copy: Path, tmp_path: Path) -> None:
    (copy / MANIFEST).unlink()
    recipe = changed(RECIPE, training={"steps": 3, "resume": str(copy)})
    assert [line["step"] for line in run(recipe, 1, tmp_path / "run")] == [3]
