"""Start runs from Python, a notebook's above all, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from mcore_lab.errors import LabError


def launch(recipe: str, *options: str, nproc: int | None = None) -> dict[str, Any]:
    """Run a recipe on ranks of this machine, as `mcore-lab run RECIPE OPTIONS` does.

    Options are the command's words: `launch("tp2_gpt", "--training.steps", "5", nproc=2)`. Returns
    what the command prints with `--json`: how the run ended, and the folder that it left. Raises
    LabError with what the command says where it fails. Not in this process: a notebook's has
    threads, which do not survive the fork of a rank.
    """
    words = [sys.executable, "-m", "mcore_lab", "run", recipe, "--json", *options]
    words += [] if nproc is None else ["--nproc", str(nproc)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().rpartition("error: ")[2]
        raise LabError(said or f"mcore-lab run ended with status {done.returncode}")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary
