"""What `mcore-lab run` says to options of several machines: the torchrun command that has them."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence

from mcore_lab.cli.arguments import recipe_arguments
from mcore_lab.config import LaunchSettings
from mcore_lab.errors import ConfigError
from mcore_lab.lessons import LESSONS

_OF_SEVERAL = (
    *("--nnodes", "--node-rank", "--master-addr", "--master-port", "--local-addr"),
    *("--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--rdzv-conf"),
)
_OF_TORCHRUN = ("--nproc-per-node", "--nproc", "--max-restarts")
_NODES = r"(?:[1-9]\d*:)?[1-9]\d*"
_PORT = "29500"


def require_one_machine(argv: Sequence[str], what: str, settings: type[LaunchSettings]) -> None:
    """Raise ConfigError with torchrun's command if `run NAME [options]` is of several machines.

    Raises it too where the recipe's own options are wrong.
    """
    name, *options = argv
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default="")
    for option in (*_OF_SEVERAL, *_OF_TORCHRUN):
        parser.add_argument(option, option.replace("-", "_").replace("__", "--", 1), nargs="?")
    values, rest = parser.parse_known_args(options)
    given = {option: getattr(values, option[2:].replace("-", "_")) for option in _OF_SEVERAL}
    used = [option for option, value in given.items() if value != ""]
    if not used:
        return
    nodes = given["--nnodes"] if re.fullmatch(_NODES, given["--nnodes"] or "") else "2"
    ranks = values.nproc_per_node or values.nproc
    if name in LESSONS:
        program = ["-m", f"mcore_lab.lessons.{name}"]
    else:
        arguments, world = recipe_arguments("run", what, [name, *rest], settings)
        ranks = ranks or str(-(-world // int(nodes.rpartition(":")[2])))
        recipe = arguments.recipe.name
        program = [recipe] if recipe.endswith(".py") else ["-m", f"mcore_lab.recipes.{recipe}"]
        program += ["--config", name] if name.endswith(".toml") else []
    first = f"{given['--master-addr'] or 'FIRST_MACHINE'}:{given['--master-port'] or _PORT}"
    words = ["torchrun", "--nnodes", nodes, "--nproc-per-node", ranks or "1"]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", given["--rdzv-endpoint"] or first]
    words += ["--rdzv-id", given["--rdzv-id"]] if given["--rdzv-id"] else []
    words += ["--max-restarts", values.max_restarts] if values.max_restarts else []
    raise ConfigError(
        f"{used[0]} is torchrun's: mcore-lab run starts the ranks of this machine; "
        f"on each of several, type: {shlex.join([*words, *program, *rest])}"
    )
