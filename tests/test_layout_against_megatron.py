"""The grid and the rules of a layout, held against what Megatron-Core builds and refuses.

One process stands for any rank of any world: torch's "fake" backend makes real process groups whose
collectives do nothing, and `parallel_state` is the real one.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_cases import WRONG, Data, Model, Wrong, layout_of

from mcore_lab.layout import ParallelLayout
from mcore_lab.layout.rules import broken_rules
from mcore_lab.layout.rules.case import Case

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@contextmanager
def rank_of_world(rank: int, world_size: int) -> Iterator[None]:
    torch.distributed.init_process_group(
        backend="fake", store=FakeStore(), rank=rank, world_size=world_size
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def initialize(layout: ParallelLayout) -> None:
    parallel_state.initialize_model_parallel(
        **layout.model_parallel_sizes(), create_gloo_process_groups=False
    )


# Groups and coordinates.

LAYOUTS = [
    (layout_of(), 1),
    (layout_of(), 4),
    (layout_of(tp=2), 2),
    (layout_of(tp=2, pp=2), 8),
    (layout_of(pp=4), 8),
    (layout_of(tp=2, cp=2, pp=2), 8),
    (layout_of(cp=2), 8),
    (layout_of(ep=4), 8),
    (layout_of(tp=2, ep=2), 8),
    (layout_of(tp=2, ep=2, etp=1), 2),
    (layout_of(tp=2, cp=2, ep=4, etp=1), 8),
    (layout_of(tp=1, ep=2, etp=2), 8),
    (layout_of(tp=2, pp=2, ep=4, etp=1), 8),
    (layout_of(tp=2, cp=2, pp=2, ep=2, etp=2), 16),
    (layout_of(tp=2, cp=3, pp=2, ep=3, etp=1), 24),
    (layout_of(tp=2, cp=2, pp=2, order="cp-tp-ep-dp-pp"), 16),
    (layout_of(tp=2, pp=2, ep=2, order="dp-tp-cp-ep-pp"), 8),
    (layout_of(tp=2, pp=2, ep=2, etp=2, cp=2, order="tp-ep-cp-pp-dp"), 16),
    (layout_of(tp=2, pp=2, order="tp-pp-dp-cp-ep"), 8),
    (layout_of(tp=2, pp=2, order="pp-dp-cp-ep-tp"), 8),
]

GROUPS: dict[str, Callable[[], Any]] = {
    "tp": parallel_state.get_tensor_model_parallel_group,
    "cp": parallel_state.get_context_parallel_group,
    "dp": parallel_state.get_data_parallel_group,
    "pp": parallel_state.get_pipeline_model_parallel_group,
    "dp-cp": lambda: parallel_state.get_data_parallel_group(with_context_parallel=True),
    "tp-pp": parallel_state.get_model_parallel_group,
    "tp-cp": parallel_state.get_tensor_and_context_parallel_group,
    "tp-dp": parallel_state.get_tensor_and_data_parallel_group,
    "tp-dp-cp": lambda: parallel_state.get_tensor_and_data_parallel_group(
        with_context_parallel=True
    ),
    "ep": parallel_state.get_expert_model_parallel_group,
    "etp": parallel_state.get_expert_tensor_parallel_group,
    "edp": parallel_state.get_expert_data_parallel_group,
    "etp-ep": parallel_state.get_expert_tensor_and_model_parallel_group,
    "etp-ep-pp": parallel_state.get_expert_tensor_model_pipeline_parallel_group,
    "embedding": lambda: parallel_state.get_embedding_group(check_initialized=False),
    "position-embedding": lambda: parallel_state.get_position_embedding_group(
        check_initialized=False
    ),
}

COORDINATES = {
    "tp": parallel_state.get_tensor_model_parallel_rank,
    "cp": parallel_state.get_context_parallel_rank,
    "dp": parallel_state.get_data_parallel_rank,
    "pp": parallel_state.get_pipeline_model_parallel_rank,
    "ep": parallel_state.get_expert_model_parallel_rank,
    "etp": parallel_state.get_expert_tensor_parallel_rank,
    "edp": parallel_state.get_expert_data_parallel_rank,
}

every_layout = pytest.mark.parametrize(
    ("layout", "world_size"),
    LAYOUTS,
    ids=[
        f"{world}-ranks-tp{at.tp}-cp{at.cp}-pp{at.pp}-ep{at.ep}-etp{at.etp}-{at.order}"
        for at, world in LAYOUTS
    ],
)


@every_layout
def test_groups_are_those_that_parallel_state_builds(layout: ParallelLayout, world_size: int):
    for rank in range(world_size):
        with rank_of_world(rank, world_size):
            initialize(layout)
            built = {kind: group() for kind, group in GROUPS.items()}
            members = {
                kind: tuple(torch.distributed.get_process_group_ranks(group))
                for kind, group in built.items()
                if group is not None
            }
        mine = {
            kind: group
            for kind in GROUPS
            for group in layout.groups(kind, world_size)
            if rank in group
        }
        assert mine == members


@every_layout
def test_coordinates_are_those_that_parallel_state_reports(layout: ParallelLayout, world_size: int):
    for rank in range(world_size):
        with rank_of_world(rank, world_size):
            initialize(layout)
            reported = {axis: rank_on() for axis, rank_on in COORDINATES.items()}
        place = layout.coordinates(rank, world_size)
        assert {axis: getattr(place, axis) for axis in COORDINATES} == reported


# What Megatron-Core refuses.


def is_refused(build: Callable[[], Any]) -> bool:
    try:
        build()
    except (AssertionError, RuntimeError, ValueError, ZeroDivisionError):
        return True
    return False


def groups_are_refused(layout: ParallelLayout, world_size: int) -> bool:
    with rank_of_world(0, world_size):
        return is_refused(lambda: initialize(layout))


ORDERS = ["-".join(order) for order in itertools.permutations(["tp", "cp", "ep", "dp", "pp"])]
sizes = st.sampled_from([1, 1, 2, 2, 3, 4])


@given(
    sizes=st.fixed_dictionaries(
        {"tp": sizes, "cp": sizes, "pp": sizes, "ep": sizes},
        optional={"etp": sizes, "vpp": st.sampled_from([1, 2])},
    ),
    order=st.sampled_from(ORDERS),
    replicas=st.sampled_from([1, 2, 3, 4]),
    rest=st.sampled_from([0, 0, 0, 1]),
)
@settings(deadline=None, max_examples=400)
def test_groups_that_megatron_refuses_are_those_that_break_a_rule(
    sizes: dict[str, int], order: str, replicas: int, rest: int
):
    layout = layout_of(order=order, **sizes)
    world_size = layout.tp * layout.cp * layout.pp * replicas + rest
    model = Model(
        num_layers=48,
        num_attention_heads=12,
        hidden_size=96,
        num_moe_experts=12,
        transformer={"add_bias_linear": False},
    )
    micro_batches = 4 * layout.pp
    data = Data(
        sequence_length=96,
        micro_batch_size=1,
        global_batch_size=micro_batches * max(1, world_size // (layout.tp * layout.cp * layout.pp)),
    )
    if layout.tp > 1:
        layout = replace(layout, sequence_parallel=True)
    assert bool(layout.check(model, data, world_size)) == groups_are_refused(layout, world_size)


def build_model(case: Case) -> None:
    """Build every chunk of every pipeline stage, each on its own rank."""
    layout, model = case.layout, case.model
    for stage in range(layout.pp):
        # The first stage's rank is 0 in every order, even where the grid cannot be built.
        rank = layout.rank_of(world_size=case.world_size, pp=stage) if stage else 0
        with rank_of_world(rank, case.world_size):
            initialize(layout)
            config = transformer_config(case)
            for chunk in range(layout.vpp):
                vp_stage = chunk if layout.vpp > 1 else None
                GPTModel(
                    config=config,
                    transformer_layer_spec=layers(config, vp_stage),
                    vocab_size=model.vocab_size or 96,
                    max_sequence_length=64,
                    pre_process=stage == chunk == 0,
                    post_process=stage == layout.pp - 1 and chunk == layout.vpp - 1,
                    vp_stage=vp_stage,
                )


def transformer_config(case: Case) -> Any:
    numbers = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups")
    numbers += ("ffn_hidden_size", "num_moe_experts")
    return TransformerConfig(
        **{name: getattr(case.model, name) for name in numbers},
        **{**case.layout.transformer_fields(), **case.model.transformer},
        use_cpu_initialization=True,
        perform_initialization=False,
        pipeline_dtype=torch.float32,
    )


def layers(config: Any, vp_stage: int | None) -> Any:
    """Return this chunk's layers, without the norms that refuse sequence parallelism."""
    layer = get_gpt_layer_local_spec(num_experts=config.num_moe_experts)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=IdentityOp)


REFUSED_WHEN_BUILT = [
    "a_world_with_a_rest",
    "experts_that_do_not_fold_into_the_world",
    "an_order_that_tears_pipelines_apart",
    "uneven_heads",
    "query_groups_that_neither_split_nor_are_shared",
    "a_shared_query_group_that_leaves_part_of_a_column",
    "an_uneven_feed_forward",
    "an_uneven_vocabulary",
    "sequence_parallelism_on_one_rank",
    "interleaving_of_one_stage",
    "layers_divided_in_two_ways",
    "uneven_layers",
    "uneven_layers_counting_the_embedding",
    "uneven_ends_that_leave_a_rest",
    "uneven_ends_that_chunks_do_not_divide",
    "interleaved_uneven_ends_with_nothing_in_between",
    "a_stage_layout_of_other_layers",
    "expert_parallelism_without_experts",
    "uneven_experts",
    "an_uneven_expert_width",
    "an_uneven_shared_expert",
    "split_experts_with_a_bias",
    "shared_experts_with_a_bias",
]


@pytest.mark.parametrize("name", REFUSED_WHEN_BUILT)
def test_megatron_refuses_to_build_what_breaks_the_rule_and_builds_what_mends_it(name: str):
    wrong = WRONG[name]
    assert is_refused(lambda: build_model(wrong.case))
    build_model(wrong.mend().case)


few = st.sampled_from([1, 1, 2, 3, 4])
built = st.builds(
    Wrong,
    layout=st.fixed_dictionaries(
        {},
        optional={
            "tp": few,
            "pp": few,
            "vpp": st.sampled_from([1, 2, 3]),
            "ep": few,
            "etp": st.sampled_from([1, 2]),
            "sp": st.booleans(),
        },
    ),
    model=st.fixed_dictionaries(
        {
            "num_layers": st.integers(1, 12),
            "num_attention_heads": st.sampled_from([2, 4, 6, 12]),
            "hidden_size": st.just(24),
        },
        optional={
            "num_query_groups": st.sampled_from([1, 2, 3]),
            "ffn_hidden_size": st.sampled_from([24, 25, 36]),
            "num_moe_experts": st.sampled_from([2, 3, 4, 12]),
            "vocab_size": st.sampled_from([24, 25]),
            "transformer": st.fixed_dictionaries(
                {},
                optional={
                    "add_bias_linear": st.booleans(),
                    "kv_channels": st.sampled_from([1, 2, 3]),
                    "num_layers_in_first_pipeline_stage": st.integers(1, 4),
                    "num_layers_in_last_pipeline_stage": st.integers(1, 4),
                    "account_for_embedding_in_pipeline_split": st.booleans(),
                    "account_for_loss_in_pipeline_split": st.booleans(),
                },
            ),
        },
    ),
    data=st.just({"global_batch_size": 4 * 12 * 12, "sequence_length": 48}),
    world=st.sampled_from([1, 2, 3, 4, 6, 12]),
)


@given(built)
@settings(deadline=None, max_examples=300)
def test_megatron_builds_whatever_breaks_no_rule(wrong: Wrong):
    if not broken_rules(wrong.case):
        build_model(wrong.case)
