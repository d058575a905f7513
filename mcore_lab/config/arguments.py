"""A recipe's command line: every field of the recipe is an option, laid over the recipe's value."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from mcore_lab.config.options import given_words, given_words_of
from mcore_lab.config.overlay import COMMAND_LINE, field_types, lay_over
from mcore_lab.config.recipe import Recipe
from mcore_lab.config.toml import recipe_from_toml
from mcore_lab.errors import LabError, LostPeerError, PreemptedError

T = TypeVar("T")
_TELLING_SECONDS = 30


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a recipe's command line says apart from the recipe itself."""

    config: list[str] | None = None
    """TOML files laid over the recipe before all other options; a later one wins."""
    run_dir: str | None = None
    """Folder of the run; runs/NAME if not set."""
    fresh: bool = False
    """Start an existing run folder anew: what it holds is removed."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True, kw_only=True)
class TraceSettings(Settings):
    """Those of what trains a recipe."""

    trace: bool = False
    """Record when each rank computes, communicates and waits in a few steps, and its memory."""
    trace_steps: int = 3
    """How many steps are traced, after two of warm-up."""
    track: str | None = None
    """Follow the run with tensorboard, or with a tracker of one's own: module:Class."""


@dataclass(frozen=True, kw_only=True)
class LaunchSettings(Settings):
    """Those of a command that knows how many ranks there are, which else torchrun does."""

    nproc: int | None = None
    """Ranks on this machine; as few as the layout allows if not set."""


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """A command line that was read: the recipe with every override, and how to run it."""

    recipe: Recipe
    run_dir: Path
    fresh: bool = False
    json: bool = False
    nproc: int | None = None
    """Ranks on this machine; None if it was not given, and under torchrun."""
    trace: bool = False
    """Whether some steps are traced."""
    trace_steps: int = 3
    track: str | None = None
    """Names the tracker, if there is to be one."""
    launch: str = ""
    """Names the launch, so that a restart of it knows what is its own in the run folder."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """What a command of its own adds to these: the fields that its settings have beside them."""


def parse_recipe(
    default: Recipe, argv: Sequence[str], prog: str, settings: type[Settings] = Settings
) -> RunArguments:
    """Return the recipe with what the command line says laid over it.

    Raises ConfigError for whatever a command line may not say; `--help` prints the help and raises
    SystemExit(0).
    """
    given = given_words(default, argv, prog, settings, quiet=not is_rank_0())
    said = _taken_from(given, settings)
    values = {f.name: getattr(said, f.name) for f in fields(settings)}
    recipe = default
    for file in values.pop("config") or ():
        recipe = recipe_from_toml(file, base=recipe)
    recipe = lay_over(recipe, given, COMMAND_LINE)
    run_dir = Path(values.pop("run_dir") or Path("runs") / recipe.title)
    shared = {f.name: values.pop(f.name) for f in fields(RunArguments) if f.name in values}
    return RunArguments(recipe=recipe, run_dir=run_dir, **shared, own=values)


def parse_settings(settings: type[T], argv: Sequence[str], prog: str, what: str) -> T:
    """Return what a command line says whose options are the fields of `settings`, and no others.

    `what` describes the program in its help. Raises as `parse_recipe` does.
    """
    return _taken_from(given_words_of(settings, argv, prog, what, quiet=not is_rank_0()), settings)


def _taken_from(given: dict[str, Any], settings: type[T]) -> T:
    """Return the settings, with the words that were given for them taken out of `given`."""
    return settings(
        **{
            name: COMMAND_LINE.value(name, annotation, given.pop(name))
            for name, annotation in field_types(settings).items()
            if name in given
        }
    )


def parse_recipe_or_exit(default: Recipe, argv: Sequence[str] | None = None) -> RunArguments:
    """Return `parse_recipe` of this program's command line: for a module that torchrun starts."""
    words = sys.argv[1:] if argv is None else argv
    try:
        return parse_recipe(default, words, f"python {_program(default)}", TraceSettings)
    except LabError as error:
        exit_with(error)


def _program(recipe: Recipe) -> str:
    is_own = recipe.name != recipe.title
    return Path(recipe.name).name if is_own else f"-m mcore_lab.recipes.{recipe.name}"


def exit_with(error: LabError) -> NoReturn:
    """Leave the program with the error's exit status; rank 0 prints its message.

    torchrun ends all ranks when one has left: the others wait for that, so that rank 0 comes to its
    word. One that is alone with its error says it itself in the end. A rank that another has left
    speaks for its machine, which rank 0 may not be on; one that waited in vain, for itself.
    """
    if isinstance(error, LostPeerError) and (error.timed_out or _is_first_of_its_machine()):
        print(f"error: {error}", file=sys.stderr)
    elif not is_rank_0() and not isinstance(error, PreemptedError):
        time.sleep(_TELLING_SECONDS)
        print(f"error on rank {os.environ['RANK']}: {error}", file=sys.stderr)
    elif is_rank_0():
        print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def _is_first_of_its_machine() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def is_rank_0() -> bool:
    """Say whether this process is the one that talks to a person."""
    return os.environ.get("RANK", "0") == "0"
