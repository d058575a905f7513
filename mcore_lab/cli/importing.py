"""`mcore-lab checkpoint import`: make a checkpoint of weights in safetensors files."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from mcore_lab.cli.arguments import smallest_world
from mcore_lab.cli.check import broken_rules
from mcore_lab.config import LaunchSettings, parse_recipe
from mcore_lab.errors import ConfigError, LayoutError
from mcore_lab.report.tables import print_json

_PROG = "mcore-lab checkpoint import"
_USAGE = f"""\
usage: {_PROG} SRC DST [--nproc N] [--training.precision bf16] [--json]

Make a checkpoint of weights in safetensors files, DST/step-00000000, to begin a run with on any
layout, and DST/recipe.toml, to run.

SRC is a file, or a folder of files with their index. Beside it is config.json, of a Llama or a
Mixtral under Hugging Face's names, or recipe.toml, of an export under Megatron-Core's. What is said
here of the recipe goes before what is there. The ranks are processes of this machine, on CPU: N of
them, or as few as hold the model once."""
_SHOWN = 3


def main(argv: Sequence[str]) -> int:
    """Write the checkpoint, say where it is and how to run it, and return 0."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    if len(argv) < 2 or any(word.startswith("-") for word in argv[:2]):
        raise ConfigError(f"two paths come first: {_PROG} SRC DST ...")
    source, target = Path(argv[0]), Path(argv[1])

    from mcore_lab.recipes.importing import import_weights, recipe_of

    arguments = parse_recipe(recipe_of(source), argv[2:], _PROG, LaunchSettings)
    recipe = arguments.recipe
    nproc = smallest_world(recipe.layout) if arguments.nproc is None else arguments.nproc
    if broken := recipe.layout.check(recipe.model, recipe.data, nproc):
        raise LayoutError(broken_rules(recipe.name, nproc, broken))
    done = import_weights(source, target, recipe, nproc)
    if arguments.json:
        files = {"checkpoint": str(done.checkpoint), "recipe": str(done.recipe)}
        print_json(files | {"nproc": nproc, "rounded": done.rounded})
        return 0
    print(f"checkpoint {done.checkpoint}")
    if done.rounded:
        names = ", ".join(done.rounded[:_SHOWN]) + ", …" * (len(done.rounded) > _SHOWN)
        print(
            f"{len(done.rounded)} tensors rounded to {recipe.training.precision}: {names}; "
            "--training.precision fp32 keeps them as they are"
        )
    command = ["mcore-lab", "run", str(done.recipe), "--checkpoint.load", str(target)]
    print("to train it:", shlex.join(command))
    return 0
