"""Recipes as TOML: a whole one, or a file laid over another recipe."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mcore_lab.config.overlay import lay_over, sections, toml_source
from mcore_lab.config.recipe import Recipe
from mcore_lab.config.tables import TABLES
from mcore_lab.errors import ConfigError


def recipe_from_toml(path: str | Path, base: Recipe | None = None) -> Recipe:
    """Return the recipe that a TOML file holds, laid over `base` or over the defaults.

    Raises ConfigError, naming the file, if it cannot be read, has an unknown table or key or a
    value of the wrong type, or is of another recipe than `base`.
    """
    given = read_toml(path)
    name = recipe_name(path, given, base.name if base else None)
    return lay_over(base or Recipe(name=name), _without_name(given), toml_source(str(path)))


def recipe_name(path: str | Path, given: Mapping[str, Any], expected: str | None = None) -> str:
    """Return the name of the recipe that a TOML file is of: the expected one, if there is one."""
    name = given.get("name", expected)
    if name is None:
        raise ConfigError(f'{path}: no `name`; say which recipe it is of: name = "tp2_gpt"')
    if not isinstance(name, str):
        raise ConfigError(f"{path}: name expects text, not {name!r}")
    if expected not in (None, name):
        raise ConfigError(f"{path} is of the recipe {name}, not of {expected}")
    return name


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return what a TOML file holds, or raise a ConfigError that names it."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def recipe_to_toml(recipe: Recipe, base: Recipe | None = None) -> str:
    """Return the recipe as TOML; `recipe_from_toml` with the same `base` gives back an equal one.

    A field that is None is left out, as TOML has no null. Where that would mean another value, that
    of `base` or in a table Megatron-Core's default, it is the string "None".
    """
    base = base or Recipe(name=recipe.name)
    lines = [f"name = {_toml(recipe.name)}"]
    for section in sections():
        part, under = getattr(recipe, section), getattr(base, section)
        values = {field.name: getattr(part, field.name) for field in fields(part)}
        tables = {key: values.pop(key) for key in list(values) if f"{section}.{key}" in TABLES}
        unsaid = {key for key in values if values[key] is None and getattr(under, key) is None}
        lines += _table(section, {key: values[key] for key in values if key not in unsaid})
        for key, table in tables.items():
            lines += _table(f"{section}.{key}", table) if table else ()
    return "\n".join(lines) + "\n"


def _without_name(given: Mapping[str, Any]) -> dict[str, Any]:
    return {section: values for section, values in given.items() if section != "name"}


def _table(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", f"[{name}]")
    for key, value in values.items():
        yield f"{key} = {_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    # JSON's escapes are TOML's, but for DEL, which JSON leaves as it is.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
