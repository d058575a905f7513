"""`python -m mcore_lab.cpu SCRIPT`, or under torchrun: run any Megatron-Core script on CPU."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path
from typing import NoReturn

from mcore_lab import cpu

_USAGE = """usage: torchrun --nproc-per-node N -m mcore_lab.cpu SCRIPT [args]
       torchrun --nproc-per-node N -m mcore_lab.cpu -m MODULE [args]

Runs a Megatron-Core script, unmodified, on CPU: CUDA becomes the CPU and NCCL becomes Gloo."""


def main() -> None:
    """Run the script or module that the arguments name as `__main__`, as `python` would."""
    match sys.argv[1:]:
        case []:
            _refuse(_USAGE)
        case ["-h" | "--help", *_]:
            print(_USAGE)
        case ["-m"]:
            _refuse("mcore_lab.cpu: -m needs the name of a module")
        case ["-m", module, *_] as arguments:
            _run_module(module, arguments[1:])
        case [script, *_] as arguments:
            _run_script(Path(script), arguments)


def _run_module(name: str, arguments: list[str]) -> None:
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        _refuse(f"mcore_lab.cpu: no module named {name}")
    cpu.enable()
    sys.argv = arguments
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_script(script: Path, arguments: list[str]) -> None:
    if not script.is_file():
        _refuse(f"mcore_lab.cpu: no script at {script}")
    sys.argv = arguments
    # It was the working directory, for -m.
    sys.path[0] = str(script.resolve().parent)
    cpu.enable()
    runpy.run_path(str(script), run_name="__main__")


def _refuse(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
