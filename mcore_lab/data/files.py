"""Which files a text is. No torch in here: a missing file is found before anything starts."""

from __future__ import annotations

from pathlib import Path

from mcore_lab.errors import DataError

_TEXT_SUFFIXES = {".md", ".py", ".rst", ".toml", ".txt", ".yaml", ".yml"}


def text_files(path: Path) -> list[Path]:
    """Return the text files at `path`: the file itself, or a folder's, in order, hidden ones left out.

    Raises DataError where there is no such file or folder, or no text in the folder.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"there is no file or folder of text at {path}")
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in _TEXT_SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        endings = ", ".join(sorted(_TEXT_SUFFIXES))
        raise DataError(f"there is no text file in {path} (looked for {endings})")
    return files
