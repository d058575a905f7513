"""Laying given values over a recipe: the same rules for a TOML file and for the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, get_type_hints

from mcore_lab.compat import TransformerField, transformer_fields
from mcore_lab.config.recipe import Model, Recipe
from mcore_lab.config.values import choices, expected, from_toml, from_words
from mcore_lab.errors import ConfigError, nearest
from mcore_lab.layout import SHORT_NAMES, ParallelLayout

DECIDED_BY = {f.name: f"layout.{f.name}" for f in fields(ParallelLayout)} | dict.fromkeys(
    ("bf16", "fp16", "params_dtype"), "training.precision"
)


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
        if field != "transformer":
            values[field] = source.value(f"{section}.{name}", known[field], value)
    part = replace(part, **values)
    return _with_transformer(part, given["transformer"], source) if "transformer" in given else part


def _with_transformer(model: Model, given: Mapping[str, Any], source: Source) -> Model:
    """Return the model with the given fields of `TransformerConfig`; some of them are its own."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{source.spell('model.transformer')} expects a table")
    known, own, other = known_transformer_fields(), {}, {}
    for name, value in given.items():
        dotted = f"model.transformer.{name}"
        if name not in known:
            hint = nearest(name, known) or "; see `mcore-lab recipes --transformer-fields`"
            raise ConfigError(
                f"{source.spell(dotted)} is not a field of the installed TransformerConfig{hint}"
            )
        if name in DECIDED_BY:
            raise ConfigError(
                f"{source.spell(dotted)} follows from {DECIDED_BY[name]}; set that instead"
            )
        if name in field_types(Model):
            own[name] = source.value(dotted, field_types(Model)[name], value)
        else:
            other[name] = source.value(dotted, known[name].annotation, value)
    merged = {**model.transformer, **other}
    _check_latent_attention(merged, source)
    return replace(model, **own, transformer=merged)


def _check_latent_attention(transformer: Mapping[str, Any], source: Source) -> None:
    if transformer.get("multi_latent_attention"):
        return
    for name in sorted(transformer.keys() - transformer_fields().keys()):
        raise ConfigError(
            f"{source.spell(f'model.transformer.{name}')} is a field of multi-latent attention; "
            "set model.transformer.multi_latent_attention to True as well"
        )


def known_transformer_fields() -> dict[str, TransformerField]:
    """Return every field that can be set, or raise a ConfigError without Megatron-Core."""
    try:
        return transformer_fields(multi_latent_attention=True)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error}: pip install 'megatron-core>=0.16.1,<0.20'") from None
