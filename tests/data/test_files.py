"""Which files of a folder are its text."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcore_lab.data import text_files
from mcore_lab.errors import DataError


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the text of {name}\n")


def found(folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in text_files(folder)]


def test_a_file_is_taken_whatever_it_is_called(tmp_path: Path) -> None:
    write(tmp_path, "corpus", ".hidden.log")
    for name in ("corpus", ".hidden.log"):
        assert text_files(tmp_path / name) == [tmp_path / name]


def test_a_folders_text_files_are_taken_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path, "b.txt", "a/z.md", "a/b/c.py", "c.toml", "picture.png", "table.csv", "noend")
    assert found(tmp_path) == ["a/b/c.py", "a/z.md", "b.txt", "c.toml"]


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", ".b.txt", ".git/c.txt", "d/.cache/e.txt")
    assert found(tmp_path) == ["a.txt"]


def test_a_folder_inside_a_hidden_one_can_be_asked_for(tmp_path: Path) -> None:
    write(tmp_path, ".notes/a.txt")
    assert found(tmp_path / ".notes") == ["a.txt"]


def test_installed_packages_are_left_out_wherever_they_are(tmp_path: Path) -> None:
    environments = ("my-env/pyvenv.cfg", "my-env/lib/six.py", "conda/conda-meta/x.md", "conda/y.py")
    packages = ("web/node_modules/left/readme.md", "vendor/site-packages/six.py")
    write(tmp_path, "a.py", "web/index.md", "__pycache__/b.py", *environments, *packages)
    assert found(tmp_path) == ["a.py", "web/index.md"]


def test_run_folders_are_left_out_under_any_name(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "recipes/recipe.toml", "out/x/recipe.toml", "out/x/metrics.jsonl")
    assert found(tmp_path) == ["a.txt", "recipes/recipe.toml"]


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=rf"no file or folder of text at {tmp_path}/nothing; --data"
    ):
        text_files(tmp_path / "nothing")


def test_a_folder_without_text_says_what_was_looked_for(tmp_path: Path) -> None:
    write(tmp_path, "picture.png", ".hidden.txt")
    with pytest.raises(
        DataError, match=rf"no text file in {tmp_path} \(looked for .md, .py, .*txt"
    ):
        text_files(tmp_path)


@pytest.mark.parametrize("path", [".", "a.txt"])
def test_empty_files_are_no_text(tmp_path: Path, path: str) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.md").touch()
    with pytest.raises(DataError, match=r"there is no text in .*: it is empty"):
        text_files(tmp_path / path)


def test_an_empty_current_folder_is_named_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"in {tmp_path}, the current folder"):
        text_files(Path())
