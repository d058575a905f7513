"""Recipe modules that are files of a person's own: found by their path, imported once."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from types import ModuleType

from mcore_lab.config import Recipe
from mcore_lab.errors import ConfigError, LabError


def is_file(name: str) -> bool:
    """Say whether a recipe's name is the path of a file of Python."""
    return name.endswith(".py")


def module_at(name: str) -> ModuleType:
    """Return the module that is the file `name`; its folder is searched first, as a program's is.

    Raises ConfigError if it is not there, cannot be imported, or its name is another module's.
    """
    path = Path(name).resolve()
    if _is_at(path, main := sys.modules["__main__"]):
        return main
    if not path.is_file():
        raise ConfigError(f"{name}: there is no such file; `mcore-lab new NAME` writes one")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        module = importlib.import_module(path.stem)
    except LabError:
        raise
    except Exception as error:
        raise ConfigError(f"{name} cannot be imported: {_where(path, error)}") from error
    if not _is_at(path, module):
        raise ConfigError(
            f"{name} has the name of another module, {module.__name__} "
            f"({getattr(module, '__file__', 'of Python itself')}): rename it"
        )
    return module


def recipe_at(name: str) -> Recipe:
    """Return the recipe that the file `name` defines. Raises ConfigError as `module_at` does."""
    recipe = getattr(module_at(name), "RECIPE", None)
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{name} defines no RECIPE; `mcore-lab new NAME` writes one that does")
    if not is_file(recipe.name) or Path(recipe.name).resolve() != Path(name).resolve():
        raise ConfigError(f"{name}: its RECIPE is to be found by its file: name=__file__")
    return recipe


def _is_at(path: Path, module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == path


def _where(path: Path, error: Exception) -> str:
    """Say what is wrong, and in which line of the file."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, SyntaxError):
        return said
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == path
    ]
    return f"line {lines[-1]}: {said}" if lines else said
