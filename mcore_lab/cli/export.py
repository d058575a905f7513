"""`mcore-lab checkpoint export`: write a checkpoint's weights as safetensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mcore_lab.checkpoint.folders import require_checkpoint
from mcore_lab.cli.arguments import Parser
from mcore_lab.errors import ConfigError
from mcore_lab.report.tables import print_json

_WHAT = """\
Write the weights of a checkpoint, of whatever layout, as whole tensors in safetensors files. One
process reads a tensor at a time. A Llama or a Mixtral gets Hugging Face's names, and a config.json
to be loaded with; any other model Megatron-Core's names, layer by layer."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: Sequence[str]) -> int:
    """Write the files, say where they are, and return 0."""
    parser = Parser(prog="mcore-lab checkpoint export", description=_WHAT)
    parser.add_argument("path", type=Path, help="a checkpoint, or a run's folder for its latest")
    parser.add_argument("out", type=Path, help="the folder to write, which must not be there yet")
    parser.add_argument("--format", choices=["safetensors"], default="safetensors")
    parser.add_argument(
        "--naming",
        choices=["auto", "megatron", "huggingface"],
        default="auto",
        help="whose names the tensors get; Hugging Face's if the model has them (auto)",
    )
    parser.add_argument(
        "--shard-size", default="5GB", help="the most that a file holds: 5GB, 500MB, or bytes"
    )
    parser.add_argument(
        "--verify", choices=["on", "off"], default="on", help="hold files against their hashes"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv or ["--help"])
    shard_size = _bytes(options.shard_size)
    source = require_checkpoint(options.path)

    from mcore_lab.recipes.carried import recipe_if_in

    recipe = recipe_if_in(source)

    from mcore_lab.exchange.export import export

    done = export(
        source,
        options.out,
        recipe,
        naming=options.naming,
        shard_size=shard_size,
        verify=options.verify == "on",
    )
    if options.json:
        print_json({"checkpoint": str(source), "out": str(options.out), **asdict(done)})
        return 0
    whose = "Hugging Face's" if done.naming == "huggingface" else "Megatron-Core's"
    print(f"{done.tensors} tensors of {done.size:,} bytes under {whose} names in {options.out}:")
    print(*(f"  {name}" for name in done.files), sep="\n")
    if done.note:
        print(f"not under Hugging Face's names: {done.note}")
    return 0


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+) *([KMG]?B?)", text.strip().upper())
    if match is None or match[2] not in _UNITS or int(match[1]) == 0:
        raise ConfigError(f"--shard-size expects a size like 5GB or 500MB, or bytes; got {text}")
    return int(match[1]) * _UNITS[match[2]]
