"""What the commands' command lines share."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mcore_lab.config import LaunchSettings, Recipe, RunArguments, parse_recipe
from mcore_lab.errors import ConfigError
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes import find_recipe, made_for, recipe_names

_PLOTS = (".svg", ".png", ".pdf")
_BYTE_TOKENS = 256
_VOCABULARY_MULTIPLE = 128


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ConfigErrors."""

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError where argparse would print its usage."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def recipe_arguments(
    command: str, what: str, argv: Sequence[str], settings: type[LaunchSettings] = LaunchSettings
) -> tuple[RunArguments, int]:
    """Return what `mcore-lab COMMAND NAME [options]` says, and the number of ranks.

    NAME is a recipe's, or the path of a TOML file; the options are the recipe's fields and those of
    `settings`. Raises ConfigError.
    """
    prog = f"mcore-lab {command}"
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(prog, what))
        raise SystemExit(0 if argv else 2)
    name, *options = argv
    if name.startswith("-"):
        raise ConfigError(f"the recipe comes first: {prog} NAME {name} ...")
    arguments = parse_recipe(find_recipe(name), options, f"{prog} {name}", settings)
    recipe = arguments.recipe
    return arguments, usual_world(recipe) if arguments.nproc is None else arguments.nproc


def usual_world(recipe: Recipe) -> int:
    """Return the ranks that a recipe is made for, in the whole replicas that its layout takes."""
    smallest = smallest_world(recipe.layout)
    return -(-made_for(recipe.name) // smallest) * smallest


def smallest_world(layout: ParallelLayout) -> int:
    """Return the fewest ranks that hold the model once and its experts once."""
    dense, experts = layout.tp * layout.cp, layout.etp * layout.ep
    return max(1, layout.pp * math.lcm(dense, experts))


def vocabulary(recipe: Recipe) -> int:
    """Return the rows of the embedding, as `model.model_vocab_size` does, which imports torch."""
    needed = _BYTE_TOKENS if recipe.data.path else recipe.data.mock_vocab_size + 1
    multiple = math.lcm(_VOCABULARY_MULTIPLE, recipe.layout.tp)
    return recipe.model.vocab_size or -(-needed // multiple) * multiple


def require_writable(option: str, file: str | Path | None) -> None:
    """Raise ConfigError if it can be seen beforehand that the file cannot be written."""
    if file is None:
        return
    path = Path(file)
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {file}: there is no folder {path.parent}")
    if path.is_dir():
        raise ConfigError(f"{option} {file}: it is a folder; name a file in it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option} {file}: it may not be written")


def require_plottable(option: str, file: Path | None) -> None:
    """Raise LabError if it can be seen beforehand that matplotlib cannot draw into the file."""
    if file is None:
        return
    from mcore_lab.report.divergence_plot import require_matplotlib

    if file.suffix not in _PLOTS:
        raise ConfigError(f"{option} {file}: a file that ends in {', '.join(_PLOTS)}")
    require_writable(option, file)
    require_matplotlib()


def write_file(option: str, file: str | Path, content: str) -> None:
    """Write what an option asked for, or raise ConfigError with what is in the way."""
    try:
        Path(file).write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option} {file}: {error.strerror}") from None


def _usage(prog: str, what: str) -> str:
    return f"""\
usage: {prog} NAME [--nproc N] [options]

{what}

NAME is one of {", ".join(recipe_names())}, a TOML file that is laid over one,
or a recipe of your own (`mcore-lab new` writes one).
`{prog} {recipe_names()[0]} --help` shows every option, with that recipe's values."""
