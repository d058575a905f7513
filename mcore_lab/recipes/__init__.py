"""The recipes: one short module each, with `RECIPE` and a `main`. Listing them imports no torch."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from mcore_lab.config import Recipe, read_toml, recipe_from_toml, recipe_name
from mcore_lab.errors import ConfigError, nearest
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes.files import is_file, module_at, recipe_at


@dataclass(frozen=True, kw_only=True)
class NextLayout:
    """A layout on which a run goes on, from the checkpoint that it has written on the last one."""

    layout: ParallelLayout
    ranks: int | None = None
    """The first of all ranks, no more than there were before; those of the whole run if not set."""


def recipe_names() -> list[str]:
    """Return the names of all recipes: the modules in here that define `RECIPE`."""
    modules = {module.name for module in pkgutil.iter_modules(__path__)}
    return sorted(name for name in modules if not name.startswith("_") and _defines_recipe(name))


def load_recipe(name: str) -> Recipe:
    """Return the recipe of that name, or that of the file of Python which the name is.

    Raises ConfigError with the near names if there is none, and as `files.recipe_at` does.
    """
    if is_file(name):
        return recipe_at(name)
    known = recipe_names()
    if name not in known:
        hint = nearest(name, known) or f"; there is {', '.join(known)}"
        raise ConfigError(f"no recipe {name}{hint}")
    recipe = _module(name).RECIPE
    assert isinstance(recipe, Recipe)
    return recipe


def find_recipe(name: str) -> Recipe:
    """Return a recipe by its name or its file, or by a TOML file, laid over the one it names.

    Raises ConfigError as `load_recipe` and `recipe_from_toml` do.
    """
    if not name.endswith(".toml"):
        return load_recipe(name)
    return recipe_from_toml(name, base=load_recipe(recipe_name(name, read_toml(name))))


def made_for(name: str) -> int:
    """Return the ranks that the recipe is made for, where its layout alone would take fewer."""
    ranks = _said_by(name, "RANKS", 1)
    assert isinstance(ranks, int)
    return ranks


def shown_layer(name: str) -> str | None:
    """Return the module of `recipes.layers` that the recipe shows; None if it trains a model."""
    layer = _said_by(name, "LAYER", None)
    assert layer is None or isinstance(layer, str)
    return layer


def later_layouts(name: str) -> tuple[NextLayout, ...]:
    """Return the layouts on which the recipe goes on after its own; most have none."""
    layouts = _said_by(name, "THEN", ())
    assert isinstance(layouts, tuple)
    return layouts


def compares(name: str) -> bool:
    """Say whether the recipe has ways to run that it compares."""
    return _said_by(name, "COMPARES", False) is True


def describe(name: str) -> str:
    """Return what the recipe is, in one line: the first of its module's docstring."""
    return (_module(name).__doc__ or "").strip().partition("\n")[0]


def _said_by(name: str, what: str, default: object) -> object:
    return getattr(_module(name), what, default)


def _module(name: str) -> ModuleType:
    return module_at(name) if is_file(name) else importlib.import_module(f"{__name__}.{name}")


def _defines_recipe(name: str) -> bool:
    # Read, not imported: a module in here that is no recipe may import torch.
    spec = importlib.util.find_spec(f"{__name__}.{name}")
    if spec is None or spec.origin is None:
        return False
    source = Path(spec.origin).read_text(encoding="utf-8")
    return re.search(r"^RECIPE\b", source, flags=re.MULTILINE) is not None
