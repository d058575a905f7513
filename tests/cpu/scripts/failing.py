"""Fails with a process group left open, as scripts do."""

import torch

torch.distributed.init_process_group("nccl")
torch.distributed.barrier()
raise ValueError("the script fails")
