"""What Megatron-Core does without Transformer Engine and its own Makefile."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from on_ranks import on_ranks

SEED = 1234


@on_ranks(1)
def test_a_missing_transformer_engine_meets_no_minimum_version() -> None:
    from megatron.core.utils import is_te_min_version

    assert not is_te_min_version("0.0.1")
    assert not is_te_min_version("2.0.0", check_equality=False)


@on_ranks(1)
def test_what_megatron_training_imports_can_be_imported_without_triton() -> None:
    import importlib.util
    import sys

    kernels = importlib.import_module(
        "megatron.core.transformer.custom_layers.batch_invariant_kernels"
    )
    assert callable(kernels.enable_batch_invariant_mode)
    assert importlib.util.find_spec("triton") is not None or "triton" not in sys.modules


@on_ranks(1)
def test_the_wheels_compiled_dataset_helper_is_used() -> None:
    import numpy as np
    from megatron.core.datasets.utils import compile_helpers

    compile_helpers()
    from megatron.core.datasets import helpers

    dataset = np.zeros(4, dtype=np.int16)
    sample = np.zeros(4, dtype=np.int64)
    helpers.build_blending_indices(dataset, sample, np.array([0.5, 0.5]), 2, 4, False)
    assert dataset.tolist() == [0, 1, 0, 1]
    assert sample.tolist() == [0, 0, 1, 1]


@on_ranks(2)
def test_layouts_that_follow_one_another_leave_no_threads_behind() -> None:
    from megatron.core import parallel_state

    def threads_of_the_next_layout(size: int) -> int:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
        dist.barrier()
        return len(list(Path("/proc/self/task").iterdir()))

    dist.init_process_group("nccl")
    threads = [threads_of_the_next_layout(size) for size in (1, 2, 1, 2, 1, 2)]
    # The last layout's groups and those of the one before it.
    assert max(threads[2:]) <= threads[1]


@on_ranks(2)
def test_a_group_that_has_just_been_dropped_still_works() -> None:
    from megatron.core import parallel_state

    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_model_parallel()
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    assert total.item() == 2


def _experts_output_and_gradient(dispatcher: str) -> tuple[torch.Tensor, torch.Tensor]:
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig, build_module

    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        add_bias_linear=False,
        num_moe_experts=4,
        expert_model_parallel_size=2,
        moe_router_topk=2,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type=dispatcher,
    )
    torch.manual_seed(SEED)
    tensor_parallel.model_parallel_cuda_manual_seed(SEED)
    layer = build_module(get_gpt_layer_local_spec(num_experts=4), config=config).mlp
    torch.manual_seed(dist.get_rank())
    # Ranks route different numbers of tokens to each other.
    x = torch.randn(6, 1, 16, requires_grad=True)
    output, _ = layer(x)
    output.square().sum().backward()
    assert x.grad is not None
    return output.detach(), x.grad


@on_ranks(2)
def test_experts_give_the_same_results_whichever_way_tokens_reach_them() -> None:
    from megatron.core import parallel_state

    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    exchanged, gradient = _experts_output_and_gradient("alltoall")
    gathered, expected = _experts_output_and_gradient("allgather")
    assert exchanged.abs().max() > 0
    torch.testing.assert_close(exchanged, gathered)
    torch.testing.assert_close(gradient, expected)
