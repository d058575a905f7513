"""Which folder holds the checkpoint that a run starts from. No torch is needed to know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mcore_lab.checkpoint import starting_point, step_folder
from mcore_lab.errors import CheckpointError


def write(folder: Path) -> Path:
    """Write what can be seen of a checkpoint without reading its tensors."""
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (folder / ".metadata").write_bytes(b"pickle")
    return folder


def test_without_a_wish_a_run_starts_from_nothing(tmp_path: Path) -> None:
    write(step_folder(tmp_path, 1))
    assert starting_point(None, "none", tmp_path) is None


def test_auto_is_the_last_whole_checkpoint_of_the_run_itself(tmp_path: Path) -> None:
    assert starting_point(None, "auto", tmp_path / "nothing") is None
    for step in (0, 9, 10, 99_999_999, 100_000_000):
        folder = write(step_folder(tmp_path, step))
        assert starting_point(None, "auto", tmp_path) == (folder, False)
    step_folder(tmp_path, 200_000_000).mkdir()
    write(tmp_path / ".step-00000300.unfinished")
    write(tmp_path / "step-best")
    assert starting_point(None, "auto", tmp_path) == (folder, False)


def test_a_path_is_a_checkpoint_a_run_or_its_checkpoints(tmp_path: Path) -> None:
    write(step_folder(tmp_path / "run" / "checkpoints", 1))
    last = write(step_folder(tmp_path / "run" / "checkpoints", 2))
    for path in (last, last.parent, last.parent.parent):
        assert starting_point(None, str(path), tmp_path) == (last, False)
        assert starting_point(str(path), "none", tmp_path) == (last, True)


def test_going_on_goes_before_weights_to_begin_with(tmp_path: Path) -> None:
    """A run that began with weights and was stopped can be started again by the same command."""
    weights = write(tmp_path / "weights")
    assert starting_point(str(weights), "auto", tmp_path / "run") == (weights, True)
    own = write(step_folder(tmp_path / "run", 1))
    assert starting_point(str(weights), "auto", tmp_path / "run") == (own, False)
    assert starting_point(str(weights), str(own), tmp_path) == (own, False)


@pytest.mark.parametrize("load", [True, False])
def test_a_path_that_holds_none_says_what_it_lacks(tmp_path: Path, load: bool) -> None:
    def message(path: Path) -> str:
        with pytest.raises(CheckpointError) as raised:
            starting_point(*((str(path), "none") if load else (None, str(path))), tmp_path)
        return str(raised.value)

    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    nothing = tmp_path / "nothing"
    assert message(nothing) == f"there is no checkpoint at {nothing}: no such folder"
    lacks = "neither metadata.json nor a folder step-N is in it"
    for name in ("empty", "file"):
        assert message(tmp_path / name) == f"there is no checkpoint at {tmp_path / name}: {lacks}"


def test_the_name_of_a_run_without_its_folder_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(step_folder(Path("runs/one/checkpoints"), 1))
    with pytest.raises(CheckpointError, match=r"no such folder; did you mean runs/one\?$"):
        starting_point("one", "none", tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", "\0\xff"])
def test_a_damaged_mark_is_seen_at_once(tmp_path: Path, text: str) -> None:
    folder = write(step_folder(tmp_path, 1))
    (folder / "metadata.json").write_text(text, encoding="latin-1")
    for resume in ("auto", str(folder)):
        with pytest.raises(CheckpointError, match=f"{folder}: metadata.json is damaged"):
            starting_point(None, resume, tmp_path)


def test_a_checkpoint_of_another_format_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "zarr")
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointError, match="its format is zarr, not torch_dist"):
        starting_point(str(folder), "none", tmp_path)


def test_missing_and_empty_tensor_metadata_are_seen_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "one")
    (folder / ".metadata").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"one: \.metadata is empty"):
        starting_point(str(folder), "none", tmp_path)
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"one: \.metadata is missing"):
        starting_point(str(folder), "none", tmp_path)
