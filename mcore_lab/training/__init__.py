"""The parts of a training run: forward step and loss, optimizer, validation, what is recorded.

The package itself knows the run folder only and imports no torch; the rest are modules of it.
"""

from mcore_lab.training.run_folder import RunFolder

__all__ = ["RunFolder"]
