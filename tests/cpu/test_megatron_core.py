"""What Megatron-Core does without Transformer Engine and its own Makefile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


@on_ranks(2)
def test_the_norm_of_a_local_layer_spec_has_its_gradients_summed_under_sequence_parallelism() -> (
    None
):
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        persist_layer_norm=True,
    )
    norm = WrappedTorchNorm(config, 8)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), alone(config, norm))
    whole = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(SEED))
    rank = dist.get_rank()
    model(whole[2 * rank : 2 * rank + 2]).square().sum().backward()
    finalize_model_grads([model])

    expected = torch.nn.LayerNorm(8)
    expected(whole).square().sum().backward()
    assert expected.weight.grad is not None
    torch.testing.assert_close(norm.weight.main_grad, expected.weight.grad)


def alone(config: Any, module: torch.nn.Module) -> torch.nn.Module:
    """Return a model that is but this module."""
    from megatron.core.transformer.module import MegatronModule

    class Alone(MegatronModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(config)
            self.module = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x)  # type: ignore[no-any-return]

    return Alone()


@on_ranks(1)
def test_an_adam_without_a_rate_takes_no_step_until_a_scheduler_gives_one() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=None)  # type: ignore[arg-type]
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == 1
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert weight.item() < 1
