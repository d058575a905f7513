"""A test file that is written for CUDA and NCCL, in the manner of Megatron-LM's own."""

import os

import pytest
import torch
from megatron.core import parallel_state

# Asked when the file is collected.
WORLD_SIZE = int(os.environ["WORLD_SIZE"])
DEVICES = torch.cuda.device_count()


@pytest.fixture
def tensor_parallel_group():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=WORLD_SIZE)
    yield parallel_state.get_tensor_model_parallel_group()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def test_every_rank_adds_to_a_cuda_tensor(tensor_parallel_group):
    total = torch.ones(4, device="cuda", requires_grad=True)
    gathered = torch.full((1,), 2.0).cuda()
    torch.distributed.all_reduce(gathered, group=tensor_parallel_group)
    (total * gathered).sum().backward()
    assert total.grad.tolist() == [2.0 * WORLD_SIZE] * 4
    assert DEVICES == WORLD_SIZE
