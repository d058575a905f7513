"""Errors that a program for many ranks can have, planted one at a time in a model that has none.

Each is in what runs on more than one rank only: one rank's run stays what it is held against. A
rank is a process of its own, so what an error replaces in a module is gone with the rank.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed.nn.functional import all_reduce

from mcore_lab.backends import Backend
from mcore_lab.backends.context_parallel import Documents
from mcore_lab.backends.context_parallel.zigzag import Tile
from mcore_lab.config import Recipe
from mcore_lab.data import sequences
from mcore_lab.data.batches import GlobalBatches
from mcore_lab.data.sequences import Batch
from mcore_lab.layout import ParallelLayout
from mcore_lab.model import Stage, gpt_chunk
from mcore_lab.recipes import story
from mcore_lab.training.forward import ForwardStep, forward_step
from mcore_lab.training.optimizer import optimizer_config

TP2 = ParallelLayout(tensor_model_parallel_size=2)
TP2_SP = replace(TP2, sequence_parallel=True)
CP2 = ParallelLayout(context_parallel_size=2)
TP2_CP2 = replace(TP2, context_parallel_size=2)
PP2 = ParallelLayout(pipeline_model_parallel_size=2)
PP2_VPP2 = replace(PP2, virtual_pipeline_model_parallel_size=2)
DP2 = ParallelLayout()
DP2_DISTOPT = replace(DP2, use_distributed_optimizer=True)
EP2 = ParallelLayout(expert_model_parallel_size=2)
TP2_EP2 = replace(TP2_SP, expert_model_parallel_size=2, expert_tensor_parallel_size=1)

Plant = Callable[[Any], None]


@dataclass(frozen=True, kw_only=True)
class Error:
    """One error, and what the verifier must say of it."""

    plant: Plant
    """Puts it in this rank's part of the model, or in what trains it."""
    layout: ParallelLayout
    ranks: int
    of: str
    """Which model it is of: `dense` or `moe`."""
    kind: str
    name: str
    """Kind of the first number that is off, and what its name begins with."""
    hint: str
    """What is in one of the hints; empty where none is asked for."""
    forward_step: ForwardStep


ERRORS: dict[str, Error] = {}


def error(
    layout: ParallelLayout,
    kind: str,
    name: str,
    *,
    ranks: int = 2,
    of: str = "dense",
    hint: str = "",
    forward_step: ForwardStep = forward_step,
) -> Callable[[Plant], Plant]:
    """Note what plants an error, on which layout, and what the verifier must say."""

    def note(plant: Plant) -> Plant:
        ERRORS[plant.__name__] = Error(
            plant=plant,
            layout=layout,
            ranks=ranks,
            of=of,
            kind=kind,
            name=name,
            hint=hint,
            forward_step=forward_step,
        )
        return plant

    return note


# The model that is verified: what is planted when its ranks start is in it.

_planted: list[Error] = []


@contextmanager
def planted(error: Error) -> Iterator[None]:
    """Let the ranks that start in here have the error."""
    _planted.append(error)
    try:
        yield
    finally:
        _planted.remove(error)


def build(
    recipe: Recipe, config: TransformerConfig, stage: Stage, backend: Backend, vocab_size: int
) -> torch.nn.Module:
    """Return the recipe's GPT, with what is planted."""
    chunk = gpt_chunk(recipe, config, stage, backend, vocab_size)
    for one in _planted:
        one.plant(chunk)
    return chunk


def planted_forward_step(data_iterator: Iterator[Batch], model: torch.nn.Module) -> Any:
    """Take a step forward in the way of what is planted."""
    step = _planted[-1].forward_step if _planted else forward_step
    return step(data_iterator, model)


# Tensor and sequence parallelism.


@error(TP2, "copies", "gradient of decoder.layers.2.mlp.linear_fc1.layer_norm")
def a_column_parallel_layer_keeps_its_share_of_its_inputs_gradient(model: Any) -> None:
    for layer in layers(model, 2):
        layer.mlp.linear_fc1.allreduce_dgrad = False
        layer.mlp.linear_fc1.disable_grad_reduce = True


@error(TP2, "activation", "decoder.layers.1.self_attention")
def a_row_parallel_layer_keeps_its_share_of_its_output(model: Any) -> None:
    for layer in layers(model, 1):
        in_forward(layer.self_attention.linear_proj, explicit_expert_comm=True)


@error(TP2_CP2, "activation", "decoder.layers.2.self_attention", ranks=4)
def a_row_parallel_layer_sums_over_context_parallel_ranks(model: Any) -> None:
    for layer in layers(model, 2):
        group = parallel_state.get_context_parallel_group()
        in_forward(layer.self_attention.linear_proj, tp_group=group)


@error(TP2, "gradient", "decoder.layers.2.mlp.linear_fc2.weight", hint="all-reduces again")
def an_all_reduce_is_summed_again_in_its_backward_pass(model: Any) -> None:
    group = parallel_state.get_tensor_model_parallel_group()
    for layer in layers(model, 2):
        linear = layer.mlp.linear_fc2
        linear.register_forward_hook(
            lambda *args: (all_reduce(args[2][0], group=group), args[2][1])
        )
        in_forward(linear, explicit_expert_comm=True)


@error(TP2, "activation", "decoder.layers.1.mlp")
def each_rank_adds_the_bias_before_the_sum(model: Any) -> None:
    def summed(linear: Any, _: Any, output: Any) -> Any:
        return reduce_from_tensor_model_parallel_region(output[0] + linear.bias), None

    for layer in layers(model, 1):
        layer.mlp.linear_fc2.register_forward_hook(summed)
        in_forward(layer.mlp.linear_fc2, explicit_expert_comm=True)


MARK = "parameter.sequence_parallel"


@error(
    TP2_SP, "copies", "gradient of decoder.layers.1.self_attention.linear_qkv.layer_norm", hint=MARK
)
def a_norm_is_not_marked_as_sequence_parallel(model: Any) -> None:
    for layer in layers(model, 1):
        for parameter in layer.input_layernorm.parameters():
            parameter.sequence_parallel = False


@error(TP2_SP, "copies", "gradient of decoder.final_layernorm", hint="finalize_model_grads")
def gradients_are_finalized_over_replicas_alone(model: Any) -> None:
    def finalize(chunks: list[Any], num_tokens: torch.Tensor, **_: Any) -> None:
        dist.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group())
        for chunk in chunks:
            chunk.finish_grad_sync()
            chunk.scale_gradients(1 / num_tokens)

    story.finalize_model_grads = finalize


# Context parallelism.


class LastKeyHidden(Documents):
    """Documents of which a query does not see the last key of what comes before its own chunk."""

    def tiles(self, *args: Any, **kwargs: Any) -> list[Tile]:
        return [
            tile if tile.causal else tile._replace(keys=slice(tile.keys.start, tile.keys.stop - 1))
            for tile in super().tiles(*args, **kwargs)
        ]


@error(CP2, "activation", "decoder.layers.1.self_attention")
def a_mask_is_off_by_one(model: Any) -> None:
    for layer in layers(model, 1):
        core = layer.self_attention.core_attention
        attend = core._attend

        def off_by_one(query: Any, *args: Any, attend: Any = attend) -> Any:
            return attend(query, *args, LastKeyHidden.one_sequence(len(query), 2))

        core._attend = off_by_one


@error(CP2, "activation", "embedding", hint="context-parallel")
def each_rank_takes_a_half_of_the_sequence_in_plain_order(model: Any) -> None:
    rank = parallel_state.get_context_parallel_rank()
    sequences.slice_for_context_parallel_rank = lambda batch: {
        name: values.chunk(2, dim=1)[rank] for name, values in batch.items()
    }


@error(CP2, "activation", "decoder.layers.0.self_attention")
def rotary_positions_are_those_of_the_other_chunk(model: Any) -> None:
    def other(_: Any, __: Any, positions: torch.Tensor) -> torch.Tensor:
        return positions.roll(len(positions) // 2, 0)

    if dist.get_rank() == 1:
        model.rotary_pos_emb.register_forward_hook(other)


@error(CP2, "copies", "gradient of decoder.final_layernorm")
def gradients_are_summed_over_dp_where_dp_cp_is_meant(model: Any) -> None:
    def finalize(chunks: list[Any], *args: Any, **kwargs: Any) -> None:
        for chunk in chunks:
            for group in chunk.bucket_groups:
                group.data_parallel_group = parallel_state.get_data_parallel_group()
        finalize_model_grads(chunks, *args, **kwargs)

    story.finalize_model_grads = finalize


def mean_alone(data_iterator: Iterator[Batch], model: torch.nn.Module) -> Any:
    output, loss_function = forward_step(data_iterator, model)

    def two_values(losses: torch.Tensor) -> Any:
        loss_sum, num_tokens, report = loss_function(losses)
        return loss_sum / num_tokens, report

    return output, two_values


@error(
    CP2, "gradient", "decoder.final_layernorm", hint="returns two values", forward_step=mean_alone
)
def a_loss_function_returns_two_values(model: Any) -> None:
    model.config.calculate_per_token_loss = False


def labels_of_the_chunk(data_iterator: Iterator[Batch], model: torch.nn.Module) -> Any:
    batch = next(data_iterator)
    return forward_step(iter([batch | {"labels": batch["tokens"].roll(-1, 1)}]), model)


@error(CP2, "loss", "step 1, micro-batch 1", forward_step=labels_of_the_chunk)
def labels_are_the_next_tokens_of_the_chunk(model: Any) -> None:
    pass


# Pipeline parallelism.


@error(PP2, "activation", "decoder.layers.2")
def a_residual_is_dropped_on_the_second_stage(model: Any) -> None:
    for layer in layers(model, 2):
        add = layer.mlp_bda

        def without(training: bool, fused: bool, add: Any = add) -> Any:
            return lambda output, residual, *rest: add(training, fused)(
                output, torch.zeros_like(residual), *rest
            )

        layer.mlp_bda = without


@error(PP2, "copies", "gradient of embedding.word_embeddings", hint="finalize_model_grads")
def the_tied_embedding_is_not_summed_over_the_stages(model: Any) -> None:
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    module._allreduce_word_embedding_grads = lambda *args, **kwargs: None


@error(PP2_VPP2, "loss", "step 1, micro-batch", hint="batch_p2p_comm")
def two_interleaved_stages_batch_their_messages(model: Any) -> None:
    model.config.overlap_p2p_comm, model.config.batch_p2p_comm = False, True


@error(PP2, "initial weight", "", hint="did not start from the same weights")
def each_layout_draws_initial_weights_of_its_own(model: Any) -> None:
    story.load_weights = lambda *args, **options: None


# The order of layers.


@error(TP2, "activation", "decoder.layers.1.")
def two_layers_run_in_another_order(model: Any) -> None:
    for one in layers(model, 1):
        for other in layers(model, 2):
            one.forward, other.forward = other.forward, one.forward


# Data parallelism and the optimizer.


@error(DP2, "loss", "step 1, micro-batch 2", hint="global index")
def each_rank_draws_samples_of_its_own(model: Any) -> None:
    def sample_index(self: Any, position: int) -> int:
        order = np.random.default_rng((self._seed, self._rank)).permutation(self._length)
        return int(order[position])

    GlobalBatches.sample_index = sample_index  # type: ignore[method-assign]


@error(DP2, "copies", "gradient of decoder.final_layernorm", hint="finalize_model_grads")
def gradients_are_not_finalized(model: Any) -> None:
    story.finalize_model_grads = None  # type: ignore[assignment]


@error(DP2, "copies", "gradient of decoder.layers.1.mlp.linear_fc2.weight")
def one_gradient_is_not_summed_over_replicas(model: Any) -> None:
    (layer,) = layers(model, 1)

    def finalize(chunks: list[Any], num_tokens: torch.Tensor, **kwargs: Any) -> None:
        own = layer.mlp.linear_fc2.weight.main_grad.clone()
        finalize_model_grads(chunks, num_tokens, **kwargs)
        layer.mlp.linear_fc2.weight.main_grad.copy_(own / num_tokens)

    story.finalize_model_grads = finalize


@error(DP2, "gradient", "decoder.layers.2.mlp.linear_fc1.weight")
def one_gradient_is_scaled_by_a_hundredth_more(model: Any) -> None:
    for layer in layers(model, 2):
        layer.mlp.linear_fc1.weight.register_hook(lambda gradient: gradient * 1.01)


@error(DP2, "learning rate", "step 1")
def the_learning_rate_is_a_hundredth_higher(model: Any) -> None:
    story.optimizer_config = lambda recipe: optimizer_config(
        replace(recipe, training=replace(recipe.training, lr=1.01 * recipe.training.lr))
    )


@error(DP2_DISTOPT, "loss", "step 2, micro-batch 1", hint="distributed optimizer")
def weights_are_not_gathered_after_the_distributed_optimizers_step(model: Any) -> None:
    _ParamAndGradBucketGroup.start_param_sync = lambda *args, **kwargs: None


def report_of_shared_storage(data_iterator: Iterator[Batch], model: torch.nn.Module) -> Any:
    output, loss_function = forward_step(data_iterator, model)

    def shared(losses: torch.Tensor) -> Any:
        loss_sum, num_tokens, _ = loss_function(losses)
        both = torch.stack([loss_sum, num_tokens.float()])
        return both[0], num_tokens, {"lm loss": both.detach()}

    return output, shared


@error(
    DP2,
    "loss",
    "step 1, micro-batch 1",
    hint="storage of its own",
    forward_step=report_of_shared_storage,
)
def the_report_shares_its_storage_with_the_loss(model: Any) -> None:
    model.config.calculate_per_token_loss = False


# Experts.


@error(EP2, "activation", "decoder.layers.1.mlp", of="moe")
def two_experts_are_swapped(model: Any) -> None:
    def swapped(_: Any, __: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(of_experts[:, [1, 0, 2, 3]] for of_experts in output)

    for layer in layers(model, 1):
        layer.mlp.router.register_forward_hook(swapped)


@error(TP2_EP2, "activation", "decoder.layers.1.mlp", of="moe")
def one_rank_prefers_an_expert(model: Any) -> None:
    for layer in layers(model, 1) if dist.get_rank() == 1 else ():
        gating = layer.mlp.router.gating
        layer.mlp.router.gating = lambda tokens, gating=gating: (
            gating(tokens) + torch.tensor([1.0, 0.0, 0.0, 0.0])
        )


@error(EP2, "gradient", "decoder.layers.1.mlp.experts", of="moe", hint="only experts are off")
def gradients_of_experts_are_summed_over_all_replicas(model: Any) -> None:
    for parameter in expert_parameters(model):
        parameter.allreduce = True


@error(EP2, "grad norm", "step 1", of="moe", hint="their norm is not")
def clipping_leaves_out_the_experts(model: Any) -> None:
    def of_the_others(self: Any) -> Any:
        return self.chained_optimizers[0].get_grad_norm()

    ChainedOptimizer.get_grad_norm = of_the_others  # type: ignore[method-assign]


def layers(model: Any, number: int) -> list[Any]:
    """Return the layer of this number, counted from 0 in the whole model, if this rank has it."""
    return [layer for layer in model.decoder.layers if layer.layer_number == number + 1]


def expert_parameters(model: Any) -> list[torch.nn.Parameter]:
    experts = [layer.mlp.experts for layer in model.decoder.layers]
    return [parameter for module in experts for parameter in module.parameters()]


def in_forward(module: Any, **attributes: Any) -> None:
    """Give a module other attributes while it runs forward; loading and saving know its own."""
    own = {name: getattr(module, name) for name in attributes}

    def set_all(values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(module, name, value)

    module.register_forward_pre_hook(lambda *_: set_all(attributes))
    module.register_forward_hook(lambda *_: set_all(own))
