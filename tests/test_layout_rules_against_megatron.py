"""The rules of a layout, held against what Megatron-Core refuses to build or to run."""

from __future__ import annotations

import inspect
import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_ranks import initialize, is_refused, rank_of_world
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_cases import WRONG, Data, Model, Wrong, layout_of
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.utils import get_batch_on_this_cp_rank
from torch._subclasses.fake_tensor import FakeTensorMode

from mcore_lab.layout import ParallelLayout
from mcore_lab.layout.rules import broken_rules
from mcore_lab.layout.rules.case import Case

pytestmark = pytest.mark.filterwarnings("ignore")


def build_model(case: Case) -> None:
    """Build every chunk of every pipeline stage, each on its own rank."""
    layout = case.layout
    for stage in range(layout.pp):
        # The first stage's rank is 0 in every order, even where the grid cannot be built.
        rank = layout.rank_of(world_size=case.world_size, pp=stage) if stage else 0
        with rank_of_world(rank, case.world_size):
            initialize(layout)
            config = transformer_config(case)
            for chunk in range(layout.vpp):
                chunk_of_model(config, case, stage, chunk)


def chunk_of_model(config: Any, case: Case, stage: int, chunk: int) -> Any:
    layout = case.layout
    vp_stage = chunk if layout.vpp > 1 else None
    return GPTModel(
        config=config,
        transformer_layer_spec=layers(config, vp_stage),
        vocab_size=case.model.vocab_size or 96,
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


def case_of_messages(pp: int, vpp: int, **fields: bool) -> Case:
    model = Model(num_layers=8, transformer=fields)
    return Case(layout=layout_of(pp=pp, vpp=vpp), model=model, data=Data(), world_size=pp)


class ReachedFirstStepError(Exception):
    """The schedule got as far as the model's first forward step."""


@pytest.mark.parametrize("group", [None, 3, 4, 5])
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_the_interleaved_schedule_refuses_the_micro_batches_that_break_a_rule(
    pp: int, group: int | None
):
    model = Model(num_layers=24, transformer={"microbatch_group_size_per_vp_stage": group})
    cases = [
        Case(
            layout=layout_of(pp=pp, vpp=2),
            model=model,
            data=Data(micro_batch_size=1, global_batch_size=micro_batches),
            world_size=pp,
        )
        for micro_batches in range(1, 13)
    ]
    broken = [case for case in cases if broken_rules(case)]
    assert broken == [case for case in cases if is_refused(lambda c=case: run_schedule(c))]
    assert broken
    assert (len(broken) == len(cases)) == (group is not None and group < pp)


@pytest.mark.parametrize(
    "case",
    [
        case_of_messages(pp=2, vpp=1, overlap_p2p_comm=True),
        case_of_messages(pp=4, vpp=2, overlap_p2p_comm=True, batch_p2p_comm=True),
    ],
)
def test_the_schedule_refuses_the_messages_that_break_a_rule(case: Case):
    assert len(broken_rules(case)) == 1
    assert is_refused(lambda: run_schedule(case))
    run_schedule(replace(case, model=replace(case.model, transformer={})))


def run_schedule(case: Case) -> None:
    """Start a step on the first stage, up to the model's first forward pass."""

    def first_step(*_: Any) -> None:
        raise ReachedFirstStepError

    vpp = case.layout.vpp
    with rank_of_world(0, case.world_size):
        initialize(case.layout)
        config = transformer_config(case)
        # The schedule counts tokens on "cuda", where a fake tensor needs no device.
        with FakeTensorMode(allow_non_fake_inputs=True), suppress(ReachedFirstStepError):
            schedules.get_forward_backward_func()(
                forward_step_func=first_step,
                data_iterator=[iter(())] * vpp,
                model=[chunk_of_model(config, case, stage=0, chunk=n) for n in range(vpp)],
                num_microbatches=case.data.global_batch_size // case.data.micro_batch_size,
                seq_length=case.data.sequence_length,
                micro_batch_size=case.data.micro_batch_size,
                forward_only=True,
            )


REFUSED_WHEN_BUILT = [
    "a_world_with_a_rest",
    "experts_that_do_not_fold_into_the_world",
    "an_order_that_tears_pipelines_apart",
    "an_order_that_replicates_experts_less_within_a_stage",
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


@st.composite
def nearly_right(draw: st.DrawFn) -> Wrong:
    """Draw a case whose sizes mostly fit; one number in a few does not."""
    experts = draw(st.sampled_from([None, None, 12, 6]))
    layout = {"tp": draw(few), "pp": draw(st.sampled_from([1, 2, 3, 4]))}
    layout["vpp"] = draw(st.sampled_from([1, 2, 3])) if layout["pp"] > 1 else 1
    layout["ep"], layout["etp"] = (draw(few), draw(few)) if experts else (1, layout["tp"])
    layout["sp"] = layout["tp"] > 1 and (experts is not None or draw(st.booleans()))
    shared = draw(st.sampled_from([None, None, 24, 30])) if experts else None
    fields = {
        "add_bias_linear": experts is None or draw(st.sampled_from([False, False, False, True])),
        "kv_channels": draw(st.sampled_from([None, None, 1, 8])),
        "moe_shared_expert_intermediate_size": shared,
        **draw(st.sampled_from([{}, {}, {}, *UNEVEN_STAGES])),
    }
    return Wrong(
        layout=layout,
        model={
            "num_layers": draw(st.sampled_from([24, 24, 12, 11, 10, 22, 23])),
            "num_attention_heads": 12,
            "hidden_size": 24,
            "num_query_groups": draw(st.sampled_from([None, 12, 6, 4, 2, 1])),
            "ffn_hidden_size": draw(st.sampled_from([None, 48, 36, 50])),
            "num_moe_experts": experts,
            "vocab_size": draw(st.sampled_from([None, 48, 50])),
            "transformer": fields,
        },
        data={"micro_batch_size": 1, "global_batch_size": 24 * 24, "sequence_length": 24},
        world=layout["pp"] * math.lcm(layout["tp"], layout["ep"] * layout["etp"]),
    )


UNEVEN_STAGES = [
    {"num_layers_in_first_pipeline_stage": 4},
    {"num_layers_in_last_pipeline_stage": 6},
    {"num_layers_in_first_pipeline_stage": 6, "num_layers_in_last_pipeline_stage": 4},
    {"num_layers_in_first_pipeline_stage": 12, "num_layers_in_last_pipeline_stage": 12},
    {"account_for_embedding_in_pipeline_split": True},
    {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
]


@given(nearly_right())
@settings(deadline=None, max_examples=300)
def test_megatron_builds_whatever_breaks_no_rule(wrong: Wrong):
    if not broken_rules(wrong.case):
        build_model(wrong.case)


def test_experts_refuse_to_train_on_tokens_that_are_not_split_over_tensor_ranks():
    wrong = WRONG["experts_without_sequence_parallelism"]

    def first_layer_of_experts(case: Case) -> None:
        with rank_of_world(0, case.world_size):
            initialize(case.layout)
            chunk = chunk_of_model(transformer_config(case), case, stage=0, chunk=0)
            with FakeTensorMode(allow_non_fake_inputs=True):
                chunk.decoder.layers[0].mlp(torch.zeros(8, 1, case.model.hidden_size))

    with pytest.raises(ValueError, match="without also enabling sequence parallelism"):
        first_layer_of_experts(wrong.case)


SEQUENCES = range(56, 81)


@pytest.mark.parametrize("cp", [2, 3, 4])
def test_sequences_are_padded_where_context_parallelism_refuses_them(cp: int):
    layout = layout_of(cp=cp)
    version = inspect.signature(get_batch_on_this_cp_rank).parameters
    options = {"is_hybrid_cp": False} if "is_hybrid_cp" in version else {}

    def split(length: int) -> None:
        get_batch_on_this_cp_rank({"tokens": torch.zeros(1, length)}, **options)

    with rank_of_world(0, cp):
        initialize(layout)
        refused = [length for length in SEQUENCES if is_refused(lambda n=length: split(n))]
    assert refused == padded_lengths(layout)


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_sequences_are_padded_where_sequence_parallelism_refuses_them(tp: int):
    layout = layout_of(tp=tp, sp=True)

    def split(length: int) -> None:
        scatter_to_sequence_parallel_region(torch.zeros(length, 1, 1))

    with rank_of_world(0, tp):
        initialize(layout)
        refused = [length for length in SEQUENCES if is_refused(lambda n=length: split(n))]
    assert refused == padded_lengths(layout)


def padded_lengths(layout: ParallelLayout) -> list[int]:
    padded = {n: layout.padded(n) for n in SEQUENCES}
    assert all(length >= n and layout.padded(length) == length for n, length in padded.items())
    return [n for n, length in padded.items() if length != n]
