"""`mcore-lab new`: a recipe module of one's own, with a test, that runs at once."""

from __future__ import annotations

import importlib.util
import keyword
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mcore_lab.cli import template
from mcore_lab.cli.arguments import Parser
from mcore_lab.errors import ConfigError
from mcore_lab.lessons import LESSONS
from mcore_lab.recipes import recipe_names
from mcore_lab.report.tables import print_json

_NAME = "my_model"
"""What the template is called."""


def main(argv: Sequence[str]) -> int:
    """Write NAME.py, a recipe with a layer of its own, and test_NAME.py, which verifies it."""
    parser = Parser(prog="mcore-lab new", description=main.__doc__)
    parser.add_argument("name", metavar="NAME", help="of the module: a word that Python can import")
    parser.add_argument(
        "--folder", metavar="FOLDER", type=Path, default=Path(), help="where (here)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv or ["--help"])
    files = _texts(options.name)
    _require_free(options.name, [options.folder / file for file in files])
    _write({options.folder / file: text for file, text in files.items()})
    module, test = (options.folder / file for file in files)
    if options.json:
        print_json({"module": str(module), "test": str(test)})
        return 0
    print(f"{module}\n{test}\n")
    print("To go on:")
    print(f"  mcore-lab run {_as_path(module)} --nproc 2")
    print(f"  torchrun --nproc-per-node 2 {module}")
    print(f"  mcore-lab verify {_as_path(module)}")
    print(f"  pytest {test}")
    return 0


def _texts(name: str) -> dict[str, str]:
    """Return the files of the template, with their content, under another name."""
    room = Path(template.__path__[0])
    return {
        file.replace(_NAME, name): (room / file)
        .read_text(encoding="utf-8")
        .replace(f"{template.__name__}.", "")
        .replace(_NAME, name)
        for file in (f"{_NAME}.py", f"test_{_NAME}.py")
    }


def _write(texts: Mapping[Path, str]) -> None:
    """Write all the files, or none. Raises ConfigError with what is in the way."""
    begun: list[Path] = []
    for path, text in texts.items():
        try:
            # "x": a file that has come meanwhile is not overwritten.
            with path.open("x", encoding="utf-8") as new:
                begun.append(path)
                new.write(text)
        except OSError as error:
            for other in begun:
                other.unlink()
            raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _require_free(name: str, files: Sequence[Path]) -> None:
    """Raise ConfigError if the name cannot be a new module's, or the files cannot be written."""
    if not name.isidentifier() or keyword.iskeyword(name):
        why = ", but a word of its own" if keyword.iskeyword(name) else ""
        raise ConfigError(
            f"{name} is no name that Python can import{why}: letters, digits and _, as in my_model"
        )
    if name in recipe_names() or name in LESSONS:
        raise ConfigError(f"{name} is a recipe or a lesson of mcore_lab: another name")
    folder = files[0].parent
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}")
    for file in files:
        if file.exists():
            raise ConfigError(f"there is {file} already: another name, or --folder")
    if name in sys.stdlib_module_names or importlib.util.find_spec(name) is not None:
        raise ConfigError(
            f"{name} is a module that is installed here, in whose place it would be imported: "
            "another name"
        )
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"the folder {folder} may not be written")


def _as_path(module: Path) -> str:
    """Return the path as one that cannot be taken for a recipe's name."""
    return str(module) if module.parent != Path() else f"./{module}"
