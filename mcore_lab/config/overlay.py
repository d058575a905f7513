"""Laying given values over a recipe: the same rules for a TOML file and for the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, get_type_hints

from mcore_lab.compat import transformer_fields
from mcore_lab.config.recipe import Recipe
from mcore_lab.config.tables import TABLES, Table
from mcore_lab.config.values import choices, expected, from_toml, from_words
from mcore_lab.errors import ConfigError, nearest
from mcore_lab.layout import SHORT_NAMES


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where values come from: how they are read, and what a person calls a setting there."""

    read: Callable[[Any, Any], Any]
    spell: Callable[[str], str]
    """Spell a dotted name as the person wrote it."""
    show: Callable[[Any], str]
    """Spell a value as the person wrote it."""

    def value(self, dotted: str, annotation: Any, given: Any) -> Any:
        """Return what is given as the annotation has it, or raise a ConfigError that says it."""
        try:
            return self.read(annotation, given)
        except ValueError:
            hint = nearest(shown := self.show(given), choices(annotation))
            raise ConfigError(
                f"{self.spell(dotted)} expects {expected(annotation)}; got {shown}{hint}"
            ) from None


COMMAND_LINE = Source(
    read=from_words,
    spell=lambda dotted: "--" + dotted.replace("_", "-"),
    show=lambda words: " ".join(words) or "nothing",
)


def toml_source(file: str) -> Source:
    """Return the source that a TOML file is."""
    return Source(read=from_toml, spell=lambda dotted: f"{file}: {dotted}", show=repr)


def field_types(part: type) -> dict[str, Any]:
    """Return the field names and types of a recipe's part, or of the recipe."""
    hints = get_type_hints(part)
    return {field.name: hints[field.name] for field in fields(part)}


def sections() -> dict[str, type]:
    """Return the recipe's parts by name: model, data, training, checkpoint, layout."""
    parts = field_types(Recipe).items()
    return {name: part for name, part in parts if isinstance(part, type) and is_dataclass(part)}


def lay_over(recipe: Recipe, given: Mapping[str, Mapping[str, Any]], source: Source) -> Recipe:
    """Return the recipe with the given sections' values in the place of its own."""
    parts = {}
    for name, values in given.items():
        if name not in sections():
            hint = nearest(name, sections())
            raise ConfigError(f"{source.spell(name)} is not a part of a recipe{hint}")
        parts[name] = _lay_over_part(name, getattr(recipe, name), values, source)
    return replace(recipe, **parts)


def _lay_over_part(section: str, part: Any, given: Mapping[str, Any], source: Source) -> Any:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{source.spell(section)} expects a table; got {source.show(given)}")
    known = field_types(type(part))
    values = {}
    for name, value in given.items():
        field = SHORT_NAMES.get(name, name) if section == "layout" else name
        if field not in known:
            hint = nearest(name, known)
            raise ConfigError(f"{source.spell(f'{section}.{name}')} is not a setting{hint}")
        if field in values:
            raise ConfigError(f"{source.spell(f'{section}.{name}')} is given twice")
        if f"{section}.{field}" not in TABLES:
            values[field] = source.value(f"{section}.{name}", known[field], value)
    part = replace(part, **values)
    for name in given:
        if f"{section}.{name}" in TABLES:
            part = _with_table(part, section, name, given[name], source)
    return part


def _with_table(
    part: Any, section: str, name: str, given: Mapping[str, Any], source: Source
) -> Any:
    """Return the part with the given fields of a table; some of them are fields of its own."""
    table, known = TABLES[f"{section}.{name}"], TABLES[f"{section}.{name}"].known()
    if not isinstance(given, Mapping):
        raise ConfigError(f"{source.spell(f'{section}.{name}')} expects a table")
    own, other = {}, {}
    own_types = field_types(type(part))
    for field, value in given.items():
        dotted = f"{section}.{name}.{field}"
        _require_settable(table, field, dotted, source)
        if field in own_types and f"{section}.{field}" not in TABLES:
            own[field] = source.value(dotted, own_types[field], value)
        else:
            other[field] = source.value(dotted, known[field].annotation, value)
    merged = {**getattr(part, name), **other}
    if name == "transformer":
        _check_latent_attention(merged, source)
    return replace(part, **own, **{name: merged})


def _require_settable(table: Table, field: str, dotted: str, source: Source) -> None:
    if field not in table.known():
        hint = nearest(field, table.known())
        if table.configuration == "TransformerConfig":
            hint = hint or "; see `mcore-lab recipes --transformer-fields`"
        raise ConfigError(
            f"{source.spell(dotted)} is not a field of the installed {table.configuration}{hint}"
        )
    if field in table.decided_by:
        raise ConfigError(
            f"{source.spell(dotted)} follows from {table.decided_by[field]}; set that instead"
        )


def _check_latent_attention(transformer: Mapping[str, Any], source: Source) -> None:
    if transformer.get("multi_latent_attention"):
        return
    for name in sorted(transformer.keys() - transformer_fields().keys()):
        raise ConfigError(
            f"{source.spell(f'model.transformer.{name}')} is a field of multi-latent attention; "
            "set model.transformer.multi_latent_attention to True as well"
        )
