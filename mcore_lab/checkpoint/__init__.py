"""Sharded checkpoints on Megatron-Core's `dist_checkpointing`.

The package itself knows folders only and imports no torch; `save` and `load` are modules of it.
"""

from mcore_lab.checkpoint.folders import starting_point, step_folder

__all__ = ["starting_point", "step_folder"]
