"""Plain values read as their annotation says, from a command line's words or from TOML."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", bool: "[True|False]", NoneType: "None"}


def from_words(annotation: Any, words: Sequence[str]) -> Any:
    """Return the value that command-line words stand for.

    A switch may stand alone, a list is one word an item, `None` is the word None. Raises ValueError
    if the words do not fit the annotation.
    """
    if members := _members(annotation):
        return _first_that_fits(from_words, members, words)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if _is_of_any_length(annotation) and words:
        return origin(from_words(arguments[0], [word]) for word in words)
    if origin is tuple and len(words) == len(arguments):
        return tuple(from_words(a, [word]) for a, word in zip(arguments, words, strict=True))
    if annotation is bool and not words:
        return True
    if len(words) != 1:
        raise ValueError(f"{len(words)} words")
    return _from_word(annotation, words[0])


def from_toml(annotation: Any, value: Any) -> Any:
    """Return what TOML holds as the annotation has it: an integer will do where a float is meant.

    TOML has no null: where None is allowed it is the string "None". Raises ValueError if the value
    does not fit the annotation.
    """
    if members := _members(annotation):
        return _first_that_fits(from_toml, members, value)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if _is_of_any_length(annotation) and isinstance(value, list):
        return origin(from_toml(arguments[0], item) for item in value)
    if origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        return tuple(from_toml(a, item) for a, item in zip(arguments, value, strict=True))
    if origin is Literal and value in arguments and type(value) in map(type, arguments):
        return value
    if annotation is NoneType and value == "None":
        return None
    if annotation is float and type(value) is int:
        return float(value)
    if type(value) is annotation:
        return value
    raise ValueError(value)


def expected(annotation: Any) -> str:
    """Say what fits the annotation: `a whole number or None`."""
    if _is_union(annotation):
        return " or ".join(expected(member) for member in get_args(annotation))
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if _is_of_any_length(annotation):
        return f"a list of which each is {expected(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} values, each {expected(arguments[0])}"
    return "None" if annotation is NoneType else _NAMES.get(annotation, "a list")


def metavar(annotation: Any) -> str:
    """Return the annotation as an option's help shows it: `INT|None`."""
    if _is_union(annotation):
        return "|".join(dict.fromkeys(metavar(member) for member in get_args(annotation)))
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if _is_of_any_length(annotation):
        return f"[{metavar(arguments[0])} ...]"
    if origin is tuple:
        return " ".join(metavar(argument) for argument in arguments)
    return _METAVARS.get(annotation, "LIST")


def takes_many(annotation: Any) -> bool:
    """Say whether any number of words can fit the annotation: a list, or a list or None."""
    return any(map(_is_of_any_length, _members(annotation) or (annotation,)))


def choices(annotation: Any) -> list[str]:
    """Return the words that the annotation's `Literal`s allow."""
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for member in _members(annotation) for choice in choices(member)]


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return a union's members, the greedy ones last: any word is text, and a list of one."""
    if not _is_union(annotation):
        return ()
    last: dict[Any, int] = {str: 1, list: 2}
    return tuple(sorted(get_args(annotation), key=lambda m: last.get(get_origin(m) or m, 0)))


def _is_of_any_length(annotation: Any) -> Any:
    """Say whether it is a `list[X]` or a `tuple[X, ...]`."""
    return get_origin(annotation) is list or Ellipsis in get_args(annotation)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)


def _first_that_fits(read: Any, members: Sequence[Any], given: Any) -> Any:
    for member in members:
        try:
            return read(member, given)
        except ValueError:
            continue
    raise ValueError(given)


def _from_word(annotation: Any, word: str) -> Any:
    if annotation is str:
        return word
    if annotation in (int, float):
        return annotation(word)
    known = {str(choice): choice for choice in get_args(annotation)}
    if annotation is bool:
        known = {"True": True, "true": True, "False": False, "false": False}
    if annotation is NoneType:
        known = {"None": None}
    if word not in known:
        raise ValueError(word)
    return known[word]
