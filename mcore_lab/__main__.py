"""`python -m mcore_lab`: the `mcore-lab` command."""

from __future__ import annotations

import sys

from mcore_lab.cli import main

# The guard matters: processes that multiprocessing spawns import this module again.
if __name__ == "__main__":
    sys.exit(main())
