"""Which files a text is. No torch in here: a missing file is found before anything starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mcore_lab.errors import DataError

_TEXT_SUFFIXES = {".md", ".py", ".rst", ".toml", ".txt", ".yaml", ".yml"}
_INSTALLED = {"__pycache__", "node_modules", "site-packages"}
_ENVIRONMENT = {"conda-meta", "pyvenv.cfg"}
_RUN = {"metrics.jsonl", "recipe.toml"}


def text_files(path: Path) -> list[Path]:
    """Return the text files at `path`: the file itself, or a folder's, in the order of their names.

    Of a folder, what somebody wrote there: no hidden files and folders, no installed packages
    (virtual environments under any name, `node_modules`, `site-packages`), no run folders.
    Raises DataError where there is no such file or folder, or no text in it.
    """
    if path.is_file():
        return _not_all_empty(path, [path])
    if not path.is_dir():
        raise DataError(f"there is no file or folder of text at {path}; --data.path names another")
    files = sorted(file for file in _walk(path) if file.suffix in _TEXT_SUFFIXES)
    if not files:
        where = f"{path.resolve()}, the current folder" if path == Path() else str(path)
        raise DataError(
            f"there is no text file in {where} (looked for {', '.join(sorted(_TEXT_SUFFIXES))}); "
            "--data.path names another folder, or a file of any ending"
        )
    return _not_all_empty(path, files)


def _not_all_empty(path: Path, files: list[Path]) -> list[Path]:
    if not any(file.stat().st_size for file in files):
        raise DataError(f"there is no text in {path}: it is empty")
    return files


def _walk(top: Path) -> Iterator[Path]:
    for name, folders, files in os.walk(top):
        folder = Path(name)
        folders[:] = [inner for inner in folders if not _is_left_out(folder / inner)]
        yield from (folder / file for file in files if not file.startswith("."))


def _is_left_out(folder: Path) -> bool:
    if folder.name.startswith(".") or folder.name in _INSTALLED:
        return True
    is_environment = any((folder / name).exists() for name in _ENVIRONMENT)
    return is_environment or all((folder / name).exists() for name in _RUN)
