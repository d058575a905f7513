"""The command line's options: tyro finds the words of each, and draws the help."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from typing import Annotated, Any

from mcore_lab.config.overlay import field_types, sections
from mcore_lab.config.recipe import Recipe
from mcore_lab.config.tables import TABLES
from mcore_lab.config.values import metavar, takes_many
from mcore_lab.errors import ConfigError, nearest
from mcore_lab.layout import SHORT_NAMES

_HELP = """\
The values below are those of {name}; an option takes the place of one.

A switch is --layout.sp, --layout.no-sp, or --layout.sp False. None unsets an option.
Any field of Megatron-Core's TransformerConfig can be set: --model.transformer.FIELD VALUE
(`mcore-lab recipes --transformer-fields` lists them), and of its DistributedDataParallelConfig and
OptimizerConfig: --training.ddp.FIELD, --training.optimizer.FIELD."""


_ALIASES = {"checkpoint": {"async_save": ("--checkpoint.async",)}}
"""Names of options that no field can have: `async` is a word of Python's own."""


class Words(list[str]):
    """The words that follow an option, not yet read."""


def given_words(
    default: Recipe, argv: Sequence[str], prog: str, settings: type, quiet: bool = False
) -> dict[str, Any]:
    """Return the words of each given option, nested: `{"layout": {"sequence_parallel": ["True"]}}`.

    The options are the fields of the dataclass `settings` and those of the recipe. Raises
    ConfigError for unknown options; `--help` prints the help and raises SystemExit(0).
    """
    known = known_options(settings)
    words = _gathered(_spelled_out(argv, known), settings)
    options = _options_class(default, settings, words)
    return _parsed(options, words, known, prog, _HELP.format(name=default.title), quiet)


def given_words_of(
    settings: type, argv: Sequence[str], prog: str, what: str, quiet: bool = False
) -> dict[str, Any]:
    """Return the words of each given option where the fields of `settings` are all there are.

    `what` is the help's description. Raises as `given_words` does.
    """
    known = _as_options(field_types(settings))
    options = _part_class(settings, settings(), {}, {})
    return _parsed(options, list(_spelled_out(argv, known)), known, prog, what, quiet)


def _parsed(
    options: type,
    words: Sequence[str],
    known: Mapping[str, Any],
    prog: str,
    what: str,
    quiet: bool,
) -> dict[str, Any]:
    import tyro

    parsed: Any
    parsed, unknown = tyro.cli(
        options,
        args=words,
        prog=prog,
        description=what,
        return_unknown_args=True,
        console_outputs=not quiet,
    )
    if unknown:
        raise ConfigError("\n".join(_unknown(unknown, known)))
    return _given(parsed)


def _given(parsed: Any) -> dict[str, Any]:
    """Leave out of what tyro returns all that was not given."""
    values = {f.name: getattr(parsed, f.name) for f in fields(parsed)}
    nested = {name: _given(value) for name, value in values.items() if is_dataclass(value)}
    given = {name: value for name, value in values.items() if isinstance(value, Words)}
    return given | {name: value for name, value in nested.items() if value}


def _options_class(default: Recipe, settings: type, words: Sequence[str]) -> type:
    """Return a dataclass of which tyro makes the options: the settings, and the recipe's parts."""
    short = {name: (f"--layout.{key}", f"--{key}") for key, name in SHORT_NAMES.items()}
    groups = []
    for name, part in sections().items():
        own = {
            table.rpartition(".")[2]: _table_class(table, words)
            for table in TABLES
            if table.startswith(f"{name}.")
        }
        aliases = short if name == "layout" else _ALIASES.get(name, {})
        options = _part_class(part, getattr(default, name), aliases, own)
        groups.append((name, options, field(metadata={"help": part.__doc__})))
    base = _part_class(settings, settings(), {}, {})
    return make_dataclass("Options", groups, bases=(base,), frozen=True, kw_only=True)


def _table_class(table: str, words: Iterable[str]) -> type:
    """Return a dataclass of the fields of a table that are given: `--training.ddp.FIELD`."""
    name = table.rpartition(".")[2].title()
    return make_dataclass(name, [(field, _option(None)) for field in _fields_given(table, words)])


def _part_class(
    part: type, default: Any, aliases: Mapping[str, Sequence[str]], own: Mapping[str, type]
) -> type:
    """Return the part with each field as an option, but for its `own`; help is the part's."""
    options: list[Any] = [
        (name, _option(annotation, aliases.get(name, ())), field(default=getattr(default, name)))
        for name, annotation in field_types(part).items()
        if name not in own
    ]
    nested = [(name, kind, field(metadata={"help": ""})) for name, kind in own.items()]
    made = [*options, *nested]
    return make_dataclass(part.__name__, made, bases=(part,), frozen=True, kw_only=True)


def _option(annotation: Any, aliases: Sequence[str] = ()) -> Any:
    """Return the type of an option that takes any words."""
    import tyro

    words = tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar(annotation),
        instance_from_str=Words,
        is_instance=lambda _: True,
        str_from_instance=lambda default: [str(default)],
    )
    # Any default is an object: tyro need not import a type checker to find that out.
    return Annotated[object, words, tyro.conf.arg(aliases=tuple(aliases))]


def _spelled_out(argv: Sequence[str], known: Mapping[str, Any]) -> Iterator[str]:
    """Yield the words, with `--layout.no-sp` as `--layout.sp False`."""
    switches = {name for name, annotation in known.items() if annotation is bool}
    for name, table in TABLES.items():
        if any(word.startswith(f"--{name}.") for word in argv):
            switches |= {
                f"--{name}.{field.replace('_', '-')}"
                for field, known in table.known().items()
                if known.annotation is bool
            }
    for word in argv:
        negated = re.fullmatch(r"(--(?:[\w-]+\.)*)no-([\w-]+)", _option_name(word))
        if negated and (switch := negated[1] + negated[2]) in switches:
            yield from (switch, "False")
        else:
            yield word


def _gathered(words: Iterable[str], settings: type) -> list[str]:
    """Put all that is given for a list of the settings, such as `--config`, behind one option.

    Of an option that is repeated tyro takes the last.
    """
    lists = {name for name, kind in _as_options(field_types(settings)).items() if takes_many(kind)}
    rest: list[str] = []
    gathered: dict[str, list[str]] = {}
    taker = rest
    for word in words:
        name, equals, value = word.partition("=")
        if name in lists:
            taker = gathered.setdefault(name, [name])
            taker += [value] if equals else []
        else:
            taker = rest if word.startswith("--") else taker
            taker.append(word)
    return rest + [word for option in gathered.values() for word in option]


def _fields_given(table: str, words: Iterable[str]) -> list[str]:
    """Return the fields of a table that are given: `--model.transformer.FIELD`."""
    options = [_option_name(word) for word in words]
    names = [
        option.removeprefix(f"--{table}.").replace("-", "_")
        for option in options
        if option.startswith(f"--{table}.")
    ]
    return [
        name
        for name in dict.fromkeys(names)
        if re.fullmatch(r"[a-z]\w*", name) and not keyword.iskeyword(name)
    ]


def _option_name(word: str) -> str:
    return word.partition("=")[0].replace("_", "-")


def known_options(settings: type) -> dict[str, Any]:
    """Return every option with its type, by each of its names; but not the fields of tables."""
    known = dict(field_types(settings))
    for section, part in sections().items():
        known |= {f"{section}.{name}": field_types(part)[name] for name in field_types(part)}
    for short, name in SHORT_NAMES.items():
        known |= dict.fromkeys((short, f"layout.{short}"), known[f"layout.{name}"])
    for section, names in _ALIASES.items():
        for name, aliases in names.items():
            for alias in aliases:
                known[alias.removeprefix("--")] = known[f"{section}.{name}"]
    for table in TABLES:
        del known[table]
    return _as_options(known)


def _as_options(known: Mapping[str, Any]) -> dict[str, Any]:
    return {"--" + name.replace("_", "-"): annotation for name, annotation in known.items()}


def _unknown(words: Sequence[str], known: Iterable[str]) -> Iterator[str]:
    """Say of each unknown option which known ones end as it does, or are near it."""
    if not words[0].startswith("--"):
        hint = f"; did you mean --nproc {words[0]}?" if words[0].isdecimal() else ""
        yield f"unexpected argument {words[0]}{hint}"
    for option in [_option_name(word) for word in words if word.startswith("--")]:
        last = option.removeprefix("--").rpartition(".")[2]
        same = [name for name in known if name.endswith(f".{last}")]
        yield f"unknown option {option}" + (
            f"; did you mean {' or '.join(same)}?" if same else nearest(option, known, limit=2)
        )
