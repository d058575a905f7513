"""The device's random stream: apart from the CPU's, what the tracker says, restored bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from on_ranks import on_ranks
from torch.utils.checkpoint import checkpoint

SEED = 1234


def _tracker(tensor_parallel: int = 1) -> object:
    """Start Megatron-Core's model parallelism and return its seeded random tracker."""
    from megatron.core import parallel_state
    from megatron.core import tensor_parallel as tp

    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
    torch.manual_seed(SEED)
    tp.model_parallel_cuda_manual_seed(SEED)
    return tp.get_cuda_rng_tracker()


def _from_every_rank(tensor: torch.Tensor) -> list[torch.Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return gathered


@on_ranks(1)
def test_seeding_cuda_does_not_reseed_the_cpu() -> None:
    torch.manual_seed(SEED)
    expected = torch.rand(4)
    torch.manual_seed(SEED)
    torch.cuda.manual_seed(7)
    torch.cuda.manual_seed_all(8)
    assert torch.equal(torch.rand(4), expected)
    assert torch.cuda.initial_seed() == 8


@on_ranks(1)
def test_manual_seed_seeds_both_streams() -> None:
    torch.manual_seed(SEED)
    first = torch.rand(4), torch.rand(4, device="cuda")
    torch.manual_seed(SEED)
    assert torch.equal(torch.rand(4, device="cuda"), first[1])
    assert torch.equal(torch.rand(4), first[0])


@on_ranks(1)
def test_states_that_are_shared_for_cuda_graphs_give_the_same_draws_as_copied_ones() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    def draws(shared: bool) -> list[torch.Tensor]:
        tracker = CudaRNGStatesTracker(use_cudagraphable_rng=shared)
        tracker.add("outer", SEED)
        tracker.add("inner", SEED + 1)
        drawn = []
        for _ in range(2):
            with tracker.fork("outer"):
                drawn.append(torch.rand(3, device="cuda"))
                with tracker.fork("inner"):
                    drawn.append(torch.rand(3, device="cuda"))
                drawn.append(torch.rand(3, device="cuda"))
        return drawn

    torch.cuda.manual_seed(7)
    before = torch.get_rng_state()
    copied, shared = draws(shared=False), draws(shared=True)
    assert all(map(torch.equal, copied, shared))
    assert len({tuple(drawn.tolist()) for drawn in copied}) == len(copied)
    assert torch.equal(torch.get_rng_state(), before)
    # Neither has drawn from the default stream.
    default = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(7)
    assert torch.equal(torch.rand(3, device="cuda"), default)


@on_ranks(1)
def test_drawing_on_cuda_leaves_the_cpu_stream_alone() -> None:
    torch.manual_seed(SEED)
    expected = torch.rand(4)
    torch.manual_seed(SEED)
    torch.randn(4, device="cuda")
    torch.nn.functional.dropout(torch.ones(4), 0.5)
    assert torch.equal(torch.rand(4), expected)


@on_ranks(1)
def test_a_saved_cuda_state_gives_the_same_draws_again() -> None:
    state = torch.cuda.get_rng_state()
    first = torch.rand(4, device="cuda")
    assert not torch.equal(torch.rand(4, device="cuda"), first)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4, device="cuda"), first)
    torch.cuda.set_rng_state_all([state])
    assert torch.equal(torch.rand(4, device="cuda"), first)
    with torch.random.fork_rng(devices=[0]):
        torch.rand(4, device="cuda")
        torch.rand(4)
    after_fork = torch.rand(4, device="cuda")
    torch.cuda.set_rng_state(state)
    torch.rand(4, device="cuda")
    assert torch.equal(torch.rand(4, device="cuda"), after_fork)


@on_ranks(2)
def test_tensor_parallel_ranks_draw_differently_inside_a_fork_and_alike_outside() -> None:
    tracker = _tracker(tensor_parallel=2)
    x = torch.ones(1000)
    alike = torch.nn.functional.dropout(x, 0.5)
    with tracker.fork():
        apart = torch.nn.functional.dropout(x, 0.5)
        in_place = torch.empty(100).normal_()
    again = torch.nn.functional.dropout(x, 0.5)
    first, second = _from_every_rank(alike)
    assert torch.equal(first, second)
    first, second = _from_every_rank(apart)
    assert not torch.equal(first, second)
    first, second = _from_every_rank(in_place)
    assert not torch.equal(first, second)
    first, second = _from_every_rank(again)
    assert torch.equal(first, second)
    assert not torch.equal(again, alike)


@on_ranks(1)
def test_the_trackers_states_restore_its_draws() -> None:
    tracker = _tracker()
    states = tracker.get_states()
    with tracker.fork():
        first = torch.rand(4)
    with tracker.fork():
        assert not torch.equal(torch.rand(4), first)
    tracker.set_states(states)
    with tracker.fork():
        assert torch.equal(torch.rand(4), first)


@on_ranks(1)
def test_get_rng_state_inside_a_fork_is_the_cpus() -> None:
    tracker = _tracker()
    before = torch.get_rng_state()
    with tracker.fork():
        torch.rand(4)
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)


@on_ranks(1)
def test_setting_the_cpu_state_inside_a_fork_takes_effect_after_it() -> None:
    tracker = _tracker()
    state = torch.get_rng_state()
    expected = torch.rand(4)
    with tracker.fork():
        torch.set_rng_state(state)
        torch.rand(4)
    assert torch.equal(torch.rand(4), expected)


@on_ranks(1)
def test_an_error_inside_a_fork_gives_the_cpu_stream_back() -> None:
    tracker = _tracker()
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="in the fork"), tracker.fork():
        torch.rand(4)
        raise ValueError("in the fork")
    assert torch.equal(torch.default_generator.get_state(), before)


def _dropout(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.dropout(x, 0.5) * x


def _dropout_out_of_a_fork_and_in_one(x: torch.Tensor) -> torch.Tensor:
    from megatron.core import tensor_parallel as tp

    x = _dropout(x)
    with tp.get_cuda_rng_tracker().fork():
        return _dropout(x)


def _recomputed_by_megatron(x: torch.Tensor) -> torch.Tensor:
    from megatron.core import tensor_parallel as tp

    return tp.checkpoint(_dropout_out_of_a_fork_and_in_one, False, x)


def _gradient_after_other_draws(block: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    from megatron.core import tensor_parallel as tp

    torch.manual_seed(SEED)
    torch.cuda.manual_seed(SEED + 1)
    tp.get_cuda_rng_tracker().reset()
    tp.get_cuda_rng_tracker().add("model-parallel-rng", SEED + 2)
    x = torch.linspace(1, 2, 1000).requires_grad_()
    y = block(x)
    # A backward pass that did not restore the forward pass's states would draw from these.
    torch.rand(3)
    torch.rand(3, device="cuda")
    y.sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize(
    ("recomputed", "stored"),
    [
        (_recomputed_by_megatron, _dropout_out_of_a_fork_and_in_one),
        (lambda x: checkpoint(_dropout, x, use_reentrant=False), _dropout),
        (lambda x: checkpoint(_dropout, x, use_reentrant=True), _dropout),
    ],
    ids=["megatron", "torch", "torch_reentrant"],
)
@on_ranks(1)
def test_recomputed_dropout_gives_bitwise_the_same_gradients(
    recomputed: Callable[[torch.Tensor], torch.Tensor],
    stored: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    _tracker()
    gradient = _gradient_after_other_draws(recomputed)
    assert torch.equal(gradient, _gradient_after_other_draws(stored))
    assert 0 < (gradient == 0).sum() < gradient.numel()


def _layer_gradients(**recompute: Any) -> list[torch.Tensor]:
    from megatron.core import tensor_parallel as tp
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig, build_module

    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, hidden_dropout=0.5, **recompute
    )
    torch.manual_seed(SEED)
    tp.model_parallel_cuda_manual_seed(SEED)
    layer = build_module(get_gpt_layer_local_spec(), config=config)
    x = torch.randn(8, 2, 16, device="cuda", requires_grad=True)
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool).triu(1)
    output, _ = layer(hidden_states=x, attention_mask=mask)
    output.square().sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    return [gradient for gradient in gradients if gradient is not None]


@on_ranks(1)
def test_recomputed_norms_give_bitwise_the_same_gradients() -> None:
    _tracker()
    stored = _layer_gradients()
    recomputed = _layer_gradients(
        recompute_granularity="selective", recompute_modules=["layernorm"]
    )
    assert len(stored) == len(recomputed) > 8
    assert all(map(torch.equal, stored, recomputed))


@on_ranks(2)
def test_cpu_initialised_weights_are_the_slices_of_one_ranks() -> None:
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig

    _tracker(tensor_parallel=2)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        use_cpu_initialization=True,
    )
    init = torch.nn.init.normal_
    for layer, dim in ((ColumnParallelLinear, 0), (RowParallelLinear, 1)):
        extra = {"input_is_parallel": True} if layer is RowParallelLinear else {}
        torch.manual_seed(SEED)
        made = layer(
            8, 12, config=config, init_method=init, bias=False, skip_bias_add=False, **extra
        )
        torch.manual_seed(SEED)
        whole = init(torch.empty(12, 8))
        assert torch.equal(torch.cat(_from_every_rank(made.weight.detach()), dim), whole)
