"""`python -m mcore_lab.cpu SCRIPT [args]`, or under torchrun: run any Megatron-Core script on CPU."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from mcore_lab import cpu

_USAGE = """usage: torchrun --nproc-per-node N -m mcore_lab.cpu SCRIPT [args]
       torchrun --nproc-per-node N -m mcore_lab.cpu -m MODULE [args]

Runs a Megatron-Core script, unmodified, on CPU: CUDA devices become the CPU and NCCL becomes Gloo."""


def main() -> None:
    """Run the script or module that the arguments name as `__main__`."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "-m":
        if len(arguments) < 2:
            raise SystemExit("mcore_lab.cpu: -m needs the name of a module")
        cpu.enable()
        sys.argv = arguments[1:]
        sys.path.insert(0, "")
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    script = Path(arguments[0])
    if not script.is_file():
        raise SystemExit(f"mcore_lab.cpu: no script at {script}")
    cpu.enable()
    sys.argv = arguments
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
