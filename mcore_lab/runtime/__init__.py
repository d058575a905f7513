"""Processes: launching ranks, process groups and model-parallel state, logs, failure."""

from mcore_lab.runtime.device import Device, choose_device, threads_per_rank
from mcore_lab.runtime.launch import launch
from mcore_lab.runtime.logs import RankLog
from mcore_lab.runtime.parallel import World, model_parallel, process_group

__all__ = [
    "Device",
    "RankLog",
    "World",
    "choose_device",
    "launch",
    "model_parallel",
    "process_group",
    "threads_per_rank",
]
