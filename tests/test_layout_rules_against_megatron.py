"""The rules of a layout, held against what Megatron-Core refuses to build or to run."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from fake_ranks import initialize, is_refused, rank_of_world
from layout_cases import WRONG, Data, Model, layout_of
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron_refuses import chunks_of_stage, refusal, start_first_stage
from torch._subclasses.fake_tensor import FakeTensorMode

from mcore_lab.layout import ParallelLayout
from mcore_lab.layout.rules import broken_rules
from mcore_lab.layout.rules.case import Case

pytestmark = pytest.mark.filterwarnings("ignore")


def case_of_messages(pp: int, vpp: int, **fields: bool) -> Case:
    model = Model(num_layers=8, transformer=fields)
    return Case(layout=layout_of(pp=pp, vpp=vpp), model=model, data=Data(), world_size=pp)


def refused_on_the_first_stage(case: Case) -> bool:
    return bool(refusal(case, start_first_stage))


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
    assert broken == [case for case in cases if refused_on_the_first_stage(case)]
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
    assert refused_on_the_first_stage(case)
    assert not refusal(replace(case, model=replace(case.model, transformer={})))


REFUSED_AT_THE_START = [
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
    "a_stage_layout_without_a_loss",
    "a_stage_layout_of_other_predictions",
    "a_stage_layout_that_predicts_too_early",
    "a_stage_layout_of_other_layers",
    "expert_parallelism_without_experts",
    "uneven_experts",
    "an_uneven_expert_width",
    "an_uneven_shared_expert",
    "split_experts_with_a_bias",
    "shared_experts_with_a_bias",
    "a_width_of_experts_without_experts",
    "one_expert_of_a_softmax",
    "shared_experts_that_overlap_with_an_all_gather",
    "packed_documents_of_stages_that_gather",
    "an_uneven_batch",
    "an_unknown_recomputation",
    "recomputed_layers_without_a_number",
    "recomputed_modules_of_a_number_of_layers",
    "an_unknown_module",
    "a_module_that_is_not_in_the_model",
    "saved_activations_that_are_split_twice",
]


@pytest.mark.parametrize("name", REFUSED_AT_THE_START)
def test_megatron_refuses_to_start_what_breaks_the_rule_and_starts_what_mends_it(name: str):
    wrong = WRONG[name]
    assert refusal(wrong.case)
    assert not refusal(wrong.mend().case)


def test_experts_refuse_to_train_on_tokens_that_are_not_split_over_tensor_ranks():
    wrong = WRONG["experts_without_sequence_parallelism"]

    def first_layer_of_experts(case: Case) -> None:
        with rank_of_world(0, case.world_size):
            (chunk,) = chunks_of_stage(case, stage=0)
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
