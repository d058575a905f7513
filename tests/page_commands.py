"""The commands of the documents: found in their blocks and sentences, and read by the real parsers.

A command is read with an option more that does not exist. If that one alone is refused, all others
exist, and nothing has been started.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.run import get_args_parser

from mcore_lab import cli
from mcore_lab.cli.run import RunSettings
from mcore_lab.cli.sample import SampleSettings
from mcore_lab.config import LaunchSettings, TraceSettings, parse_recipe, parse_settings
from mcore_lab.config.options import known_options
from mcore_lab.errors import LabError
from mcore_lab.lessons import LESSONS, load_lesson
from mcore_lab.recipes import find_recipe, recipe_names

_LANGUAGES = ("bash", "console", "sh", "shell")
_FENCE = re.compile(r"\s*```(\w*)\s*")
_PROGRAMS = r"(?:mcore-lab|torchrun|python3?|pip|nox|\.venv/bin/\S+)"
_INDENTED = re.compile(rf" {{4}}({_PROGRAMS} .*)")
_INLINE = re.compile(r"(?<!`)`((?:mcore-lab|torchrun) [^`]+)`(?!`)")
_STANDS_FOR = {
    "…": "--nproc-per-node 2",
    "...": "--nproc-per-node 2",
    "BENCHMARK": "step",
    "FILE": "tests/test_layout.py",
    "LESSON": "tensor_parallel",
    "MODEL": "dense",
    "N": "2",
    "NAME": "tp2_gpt",
    "RECIPE": "tp2_gpt",
    "RUN": "runs/tp2_gpt",
}
"""What the words in capitals of a sentence stand for."""
_NONE = "--xqzv"
_REFUSED = re.compile(rf"error: (unknown option|.*unrecognized arguments:) {_NONE}(; .*)?")
_CHEAP = ("check", "ranks", "recipes")
"""Commands that are run: they import no torch, and start nothing."""
_OF_A_CHECKPOINT = (["checkpoint", "reshard"], ["checkpoint", "import"])
"""Commands that read options of a recipe after two paths, of which the first must be there."""


@dataclass(frozen=True)
class Command:
    """A line that a reader would type."""

    page: str
    line: int
    text: str
    is_inline: bool = False
    """It is part of a sentence, and may have words that stand for others."""

    @property
    def parts(self) -> list[list[str]]:
        """The words of each program that it starts: `a && b | c` are three."""
        reader = shlex.shlex(self.text, posix=True, punctuation_chars="&|;<>")
        reader.whitespace_split, reader.commenters = True, "#"
        parts: list[list[str]] = [[]]
        is_file = False
        for word in reader:
            if set(word) <= set("&|;"):
                parts.append([])
            elif set(word) <= set("<>&"):
                is_file = True
            elif is_file:
                is_file = False
            elif parts[-1] or not re.fullmatch(r"\w+=.*", word):
                parts[-1].append(word)
        return [part for part in parts if part]


def commands_in(page: Path, name: str) -> list[Command]:
    """Return the commands of a document, in order: of its blocks, and of its sentences."""
    found: list[Command] = []
    language: str | None = None
    unfinished: list[tuple[int, str]] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if fence := _FENCE.fullmatch(line):
            language = fence[1] if language is None else None
        elif language is None:
            if indented := _INDENTED.fullmatch(line):
                found.append(Command(name, number, indented[1]))
            else:
                found += [Command(name, number, text, True) for text in _INLINE.findall(line)]
        elif language in _LANGUAGES:
            if language == "console" and not unfinished and not line.startswith("$ "):
                continue
            unfinished.append((number, line.removeprefix("$ ").strip()))
            if not line.endswith("\\"):
                text = " ".join(part.removesuffix("\\").strip() for _, part in unfinished)
                if text and not text.startswith("#"):
                    found.append(Command(name, unfinished[0][0], text))
                unfinished = []
    return found


def wrong_with(command: Command) -> Iterator[str]:
    """Say what this project's own programs would refuse of a command."""
    for words in command.parts:
        if command.is_inline:
            words = [part for word in words for part in _STANDS_FOR.get(word, word).split()]
        match Path(words[0]).name:
            case "mcore-lab":
                yield from _wrong_with_lab(words[1:])
            case "sbatch":
                yield from _wrong_with_sbatch(words[1:], command.text)
            case "torchrun":
                yield from _wrong_with_torchrun(words[1:], whole=not command.is_inline)
            case "python" | "python3" if words[1:3] == ["-m", "mcore_lab"]:
                yield from _wrong_with_lab(words[3:])
            case "python" | "python3" if words[1:2] == ["-m"]:
                yield from _wrong_with_module(words[2], words[3:], ranks=1)


def _wrong_with_lab(words: list[str]) -> Iterator[str]:
    # A module of a reader's own, which an earlier command has written, is not there.
    words = [_STANDS_FOR["RECIPE"] if word.endswith(".py") else word for word in words]
    commands = 2 if words[0] in ("bench", "checkpoint") else 1
    if len(words) <= commands:
        # A command alone, of a sentence.
        status, said = _lab([*words, "--help"])
        if status != 0:
            yield said
    elif words[0] in _CHEAP:
        status, said = _lab(words)
        if status != 0 and "broken rule" not in said:
            yield said
    elif words[:2] in _OF_A_CHECKPOINT:
        yield from _broken_values("tp2_gpt", words[4:])
    elif words[0] == "run" and words[1] not in LESSONS:
        # A file that an earlier command has written is not there.
        is_missing = words[1].endswith(".toml") and not Path(words[1]).exists()
        yield from _broken_values("tp2_gpt" if is_missing else words[1], words[2:])
    elif words[0] == "sample":
        try:
            parse_recipe(find_recipe("tp2_gpt"), words[2:], "sample", SampleSettings)
        except LabError as error:
            yield str(error)
    else:
        _, said = _lab([*(word for word in words if word != "--json"), _NONE])
        if not _REFUSED.fullmatch(said.strip()):
            yield said


def _broken_values(name: str, options: Sequence[str]) -> Iterator[str]:
    """Say what `check` does of a recipe's options: names, values, and the rules of its layout."""
    own = known_options(RunSettings).keys() - known_options(LaunchSettings).keys()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in own:
        annotation = known_options(RunSettings)[option]
        parser.add_argument(option, nargs="?" if annotation is bool else None)
    status, said = _lab(["check", name, *parser.parse_known_args(options)[1]])
    if status != 0:
        yield said


def _wrong_with_torchrun(words: Sequence[str], *, whole: bool) -> Iterator[str]:
    if "-m" not in words and not whole:
        # `torchrun --nproc-per-node 2` of a sentence.
        words = [*words, "program.py"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = get_args_parser().parse_args(words)
    except SystemExit:
        yield said.getvalue()
        return
    if options.module:
        ranks = int(options.nproc_per_node) * int(options.nnodes.rpartition(":")[2])
        yield from _wrong_with_module(options.training_script, options.training_script_args, ranks)


def _wrong_with_sbatch(words: Sequence[str], text: str) -> Iterator[str]:
    """Say what is wrong with the recipe that a job script is given, on all ranks of its nodes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--gpus-per-node", type=int, default=1)
    script = next(place for place, word in enumerate(words) if word.endswith(".sbatch"))
    own, _ = parser.parse_known_args(words[:script])
    on_cpus = re.search(r"RANKS_PER_NODE=(\d+)", text)
    ranks = own.nodes * (int(on_cpus[1]) if on_cpus else own.gpus_per_node)
    name, *options = words[script + 1 :]
    yield from _wrong_with_module(f"mcore_lab.recipes.{name}", options, ranks)


def _wrong_with_module(module: str, words: Sequence[str], ranks: int) -> Iterator[str]:
    room, _, name = module.rpartition(".")
    try:
        if room.startswith("mcore_lab") and importlib.util.find_spec(module) is None:
            yield f"there is no module {module}"
        elif room == "mcore_lab.recipes" and name in recipe_names():
            parse_recipe(find_recipe(name), words, module, TraceSettings)
            yield from _broken_values(name, [*words, "--nproc", str(ranks)])
        elif room == "mcore_lab.lessons":
            parse_settings(load_lesson(name).settings, words, module, "")
        elif module == "pytest" and "-p" in words:
            yield from _wrong_with_module(words[list(words).index("-p") + 1], [], ranks)
    except LabError as error:
        yield str(error)


def _lab(words: Sequence[str]) -> tuple[int, str]:
    """Run `mcore-lab` in this process; return its status and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = cli.main(words)
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
    return status, said.getvalue()
