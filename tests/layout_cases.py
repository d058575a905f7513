"""Layouts that each break one rule, with what the report says of them and what mends them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mcore_lab.compat import megatron_core_is_before
from mcore_lab.layout import ParallelLayout
from mcore_lab.layout.rules.case import Case


@dataclass(frozen=True, kw_only=True)
class Model:
    num_layers: int = 4
    hidden_size: int = 64
    num_attention_heads: int = 4
    num_query_groups: int | None = None
    ffn_hidden_size: int | None = None
    num_moe_experts: int | None = None
    vocab_size: int | None = None
    max_sequence_length: int | None = None
    share_embeddings_and_output_weights: bool = False
    position_embedding_type: str = "learned_absolute"
    causal_attention: bool = True
    transformer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Data:
    sequence_length: int = 64
    micro_batch_size: int = 4
    global_batch_size: int = 32
    pack_documents: bool = False


def layout_of(*, order: str = "tp-cp-ep-dp-pp", **sizes: Any) -> ParallelLayout:
    return ParallelLayout(order=order).resized(**sizes)


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """What breaks a rule, what is said of it, and the changes that mend it."""

    layout: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    world: int = 1
    says: str = ""
    mended: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def case(self) -> Case:
        return Case(
            layout=layout_of(**self.layout),
            model=Model(**self.model),
            data=Data(**self.data),
            world_size=self.world,
        )

    def mend(self) -> Wrong:
        changed = {part: {**getattr(self, part), **new} for part, new in self.mended.items()}
        return replace(self, **changed)


def transformer(**fields: Any) -> dict[str, Any]:
    return {"transformer": fields}


UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform"}
GATED_DELTA = "" if megatron_core_is_before("0.17") else ", gdn_norm_out"
MOE = {"num_moe_experts": 4, "transformer": {"add_bias_linear": False}}

WRONG = {
    "padding_that_full_attention_sees": Wrong(
        layout={"tp": 2, "sp": True},
        world=2,
        model={"causal_attention": False},
        data={"sequence_length": 13},
        says="sequence_length must be a multiple of tp, or attention that is not causal sees "
        "padding: sequence_length 13, tp 2; use --layout.tp 1 or 13, "
        "or --data.sequence-length 12 or 14",
        mended={"data": {"sequence_length": 14}},
    ),
    "documents_that_full_attention_pads": Wrong(
        model={"causal_attention": False, "transformer": {"attention_dropout": 0.0}},
        data={"pack_documents": True},
        says="packed documents need causal attention, or they would see their padding: "
        "causal_attention False, pack_documents True; "
        "use --model.causal-attention True, or --data.pack-documents False",
        mended={"model": {"causal_attention": True}},
    ),
    "predicted_tokens_that_full_attention_sees": Wrong(
        model={"causal_attention": False, "transformer": {"mtp_num_layers": 1}},
        says="mtp_num_layers needs causal attention, or what is predicted would be seen: "
        "causal_attention False, mtp_num_layers 1; "
        "use --model.causal-attention True, or a model without mtp_num_layers",
        mended={"model": {"causal_attention": True}},
    ),
    "a_size_of_zero": Wrong(
        layout={"tp": 0},
        says="tp must be at least 1: tp 0; use --layout.tp 1",
        mended={"layout": {"tp": 1}},
    ),
    "no_layers": Wrong(
        model={"num_layers": 0},
        says="num_layers must be at least 1: num_layers 0; use --model.num-layers 1",
        mended={"model": {"num_layers": 1}},
    ),
    "no_samples_in_a_micro_batch": Wrong(
        data={"micro_batch_size": 0},
        says="micro_batch_size must be at least 1: micro_batch_size 0; "
        "use --data.micro-batch-size 1",
        mended={"data": {"micro_batch_size": 1}},
    ),
    "a_size_set_in_the_model": Wrong(
        layout={"tp": 2},
        world=2,
        model=transformer(tensor_model_parallel_size=4),
        says="tensor_model_parallel_size is the layout's to set, not model.transformer's: "
        "model.transformer has 4, the layout 2; "
        "use --layout.tensor-model-parallel-size 4, and leave it out of the model",
        mended={"model": transformer()},
    ),
    "an_order_without_a_dimension": Wrong(
        layout={"ep": 2, "order": "tp-cp-dp-pp"},
        model={"num_moe_experts": 4},
        world=2,
        says="order must name each of tp, cp, ep, dp and pp once; one of size 1 may be left out: "
        "order 'tp-cp-dp-pp'; use --layout.order tp-cp-ep-dp-pp",
        mended={"layout": {"order": "tp-dp-pp-ep"}},
    ),
    "a_world_with_a_rest": Wrong(
        layout={"tp": 2, "pp": 2},
        world=6,
        data={"global_batch_size": 24},
        says="world size must be a multiple of tp * cp * pp: "
        "world size 6, tp * cp * pp = 2 * 1 * 2 = 4; "
        "use --layout.tp 1 or 3, or --layout.pp 1 or 3, or 4 or 8 ranks",
        mended={"layout": {"pp": 1}},
    ),
    "experts_that_do_not_fold_into_the_world": Wrong(
        layout={"tp": 2, "ep": 2, "sp": True},
        model=MOE,
        world=2,
        says="world size must be a multiple of etp * ep * pp "
        "(ep and etp fold into the world, they do not multiply it): "
        "world size 2, etp * ep * pp = 2 * 2 * 1 = 4; "
        "use --layout.etp 1, or --layout.ep 1, or 4 ranks",
        mended={"layout": {"etp": 1}},
    ),
    "an_order_that_tears_pipelines_apart": Wrong(
        layout={"tp": 2, "pp": 2, "ep": 2, "etp": 1, "sp": True, "order": "tp-pp-cp-ep-dp"},
        model=MOE,
        world=4,
        says="unless pp is last in the order, dense layers and experts must have the same dp and "
        "the same pipelines: order tp-pp-cp-ep-dp, dp 1 and 1, next stage 2 and 1 ranks away; "
        "use --layout.order tp-cp-ep-dp-pp",
        mended={"layout": {"order": "tp-cp-ep-dp-pp"}},
    ),
    "an_order_that_replicates_experts_less_within_a_stage": Wrong(
        layout={"tp": 2, "pp": 2, "ep": 2, "sp": True, "order": "tp-pp-cp-ep-dp"},
        model=MOE,
        world=8,
        says="unless pp is last in the order, dense layers and experts must have the same dp and "
        "the same pipelines: order tp-pp-cp-ep-dp, dp 2 and 1, next stage 2 and 2 ranks away; "
        "use --layout.order tp-cp-ep-dp-pp",
        mended={"layout": {"order": "tp-cp-ep-dp-pp"}},
    ),
    "uneven_heads": Wrong(
        layout={"tp": 3},
        world=3,
        model={"ffn_hidden_size": 66},
        data={"global_batch_size": 12},
        says="num_attention_heads must be a multiple of tp: num_attention_heads 4, tp 3; "
        "use --layout.tp 2 or 4, or --model.num-attention-heads 3 or 6",
        mended={"model": {"num_attention_heads": 3, "hidden_size": 66}},
    ),
    "heads_that_do_not_share_query_groups": Wrong(
        model={"num_query_groups": 3},
        says="num_attention_heads must be a multiple of num_query_groups: "
        "num_attention_heads 4, num_query_groups 3; "
        "use --model.num-query-groups 2 or 4, or --model.num-attention-heads 3 or 6",
        mended={"model": {"num_query_groups": 4}},
    ),
    "query_groups_that_neither_split_nor_are_shared": Wrong(
        layout={"tp": 4},
        world=4,
        model={"num_attention_heads": 24, "hidden_size": 96, "num_query_groups": 6},
        says="num_query_groups must be a multiple or a divisor of tp: num_query_groups 6, tp 4; "
        "use --layout.tp 3 or 6, or --model.num-query-groups 4 or 8",
        mended={"model": {"num_query_groups": 8}},
    ),
    "a_shared_query_group_that_leaves_part_of_a_column": Wrong(
        layout={"tp": 16},
        world=16,
        model={"num_attention_heads": 16, "num_query_groups": 1},
        says="(num_attention_heads + 2 * num_query_groups) * kv_channels must be a multiple of tp: "
        "(16 + 2 * 1) * 4 = 72, tp 16; use --layout.tp 8, or --model.num-query-groups 2",
        mended={"model": {"num_query_groups": 2}},
    ),
    "heads_that_round_the_hidden_size_down": Wrong(
        model={"num_attention_heads": 6},
        says="hidden_size must be a multiple of num_attention_heads, or kv_channels set: "
        "hidden_size 64, num_attention_heads 6; "
        "use --model.num-attention-heads 4 or 8, or --model.hidden-size 60 or 66",
        mended={"model": transformer(kv_channels=10)},
    ),
    "an_uneven_feed_forward": Wrong(
        layout={"tp": 4},
        world=4,
        model={"ffn_hidden_size": 90},
        says="ffn_hidden_size must be a multiple of tp: ffn_hidden_size 90, tp 4; "
        "use --layout.tp 3 or 5, or --model.ffn-hidden-size 88 or 92",
        mended={"model": {"ffn_hidden_size": 92}},
    ),
    "an_uneven_vocabulary": Wrong(
        layout={"tp": 2},
        world=2,
        model={"vocab_size": 50257},
        says="vocab_size must be a multiple of tp: vocab_size 50257, tp 2; "
        "use --layout.tp 1, or --model.vocab-size 50256 or 50258",
        mended={"model": {"vocab_size": 50258}},
    ),
    "sequence_parallelism_on_one_rank": Wrong(
        layout={"sp": True},
        says="sequence_parallel needs tp above 1: tp 1; use --layout.sp False, or --layout.tp 2",
        mended={"layout": {"sp": False}},
    ),
    "interleaving_of_one_stage": Wrong(
        layout={"vpp": 2},
        says="vpp above 1 needs pp above 1: vpp 2, pp 1; use --layout.vpp 1, or --layout.pp 2",
        mended={"layout": {"vpp": 1}},
    ),
    "interleaved_messages_in_batches": Wrong(
        layout={"pp": 2, "vpp": 2},
        world=2,
        model=transformer(overlap_p2p_comm=False, batch_p2p_comm=True),
        says="interleaved stages need overlap_p2p_comm True and batch_p2p_comm False: "
        "pp 2, vpp 2, overlap_p2p_comm False, batch_p2p_comm True; "
        "use neither in model.transformer: the layout sets both",
        mended={"model": transformer()},
    ),
    "overlap_without_interleaving": Wrong(
        layout={"pp": 2},
        world=2,
        model=transformer(overlap_p2p_comm=True),
        says="overlap_p2p_comm needs vpp above 1: pp 2, vpp 1; "
        "use --layout.vpp 2, or --model.transformer.overlap_p2p_comm False",
        mended={"layout": {"vpp": 2}},
    ),
    "layers_divided_in_two_ways": Wrong(
        layout={"pp": 2},
        world=2,
        model=transformer(
            num_layers_in_first_pipeline_stage=1,
            account_for_embedding_in_pipeline_split=True,
        ),
        says="layers must be divided over stages in one way: "
        "num_layers_in_first_pipeline_stage and account_for_embedding_in_pipeline_split are set; "
        "use only one of them",
        mended={"model": transformer(num_layers_in_first_pipeline_stage=1)},
    ),
    "a_tied_output_over_stages_that_predict_several_tokens": Wrong(
        layout={"pp": 2},
        world=2,
        model={
            "share_embeddings_and_output_weights": True,
            "transformer": {"mtp_num_layers": 1},
        },
        says="with mtp_num_layers and pp above 1 the output layer needs a weight of its own: "
        "mtp_num_layers 1, pp 2, share_embeddings_and_output_weights True; "
        "use --model.share-embeddings-and-output-weights False, or --layout.pp 1",
        mended={"layout": {"pp": 1}},
    ),
    "uneven_layers": Wrong(
        layout={"pp": 2, "vpp": 2},
        world=2,
        model={"num_layers": 6},
        says="num_layers must be a multiple of pp * vpp: num_layers 6, pp 2, vpp 2; "
        "use --layout.pp 1 or 3, or --layout.vpp 1 or 3, or --model.num-layers 4 or 8",
        mended={"model": {"num_layers": 8}},
    ),
    "uneven_layers_counting_the_embedding": Wrong(
        layout={"pp": 2},
        world=2,
        model=transformer(account_for_embedding_in_pipeline_split=True),
        says="num_layers + those counted as layers must be a multiple of pp: "
        "num_layers 4, account_for_embedding_in_pipeline_split True, pp 2, vpp 1; "
        "use --layout.pp 1 or 5, or --model.num-layers 3 or 5",
        mended={"model": {"num_layers": 5}},
    ),
    "uneven_ends_that_leave_a_rest": Wrong(
        layout={"pp": 4},
        world=4,
        model={"num_layers": 10, **transformer(num_layers_in_last_pipeline_stage=2)},
        says="the stages between the uneven ends must share the other layers evenly: "
        "num_layers 10, num_layers_in_last_pipeline_stage 2, pp 4, vpp 1; "
        "use --layout.pp 3 or 5, or --model.num-layers 8 or 11",
        mended={"model": {"num_layers": 11}},
    ),
    "uneven_ends_that_chunks_do_not_divide": Wrong(
        layout={"pp": 3, "vpp": 2},
        world=3,
        model={"num_layers": 7, **transformer(num_layers_in_first_pipeline_stage=3)},
        data={"global_batch_size": 36},
        says="interleaved uneven ends need stages in between, and vpp must divide all evenly: "
        "num_layers 7, num_layers_in_first_pipeline_stage 3, pp 3, vpp 2; "
        "use --layout.vpp 1",
        mended={"model": {"num_layers": 6, **transformer(num_layers_in_first_pipeline_stage=2)}},
    ),
    "interleaved_uneven_ends_with_nothing_in_between": Wrong(
        layout={"pp": 2, "vpp": 2},
        world=2,
        model=transformer(
            num_layers_in_first_pipeline_stage=2, num_layers_in_last_pipeline_stage=2
        ),
        says="interleaved uneven ends need stages in between, and vpp must divide all evenly: "
        "num_layers 4, num_layers_in_first_pipeline_stage 2, "
        "num_layers_in_last_pipeline_stage 2, pp 2, vpp 2; use --layout.vpp 1",
        mended={"layout": {"vpp": 1}},
    ),
    "uneven_ends_of_one_stage": Wrong(
        model=transformer(
            num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=1
        ),
        says="num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage need pp "
        "above 1: 1 and 1 layers, pp 1; use --layout.pp 2, or neither of them",
        mended={"model": transformer()},
    ),
    "a_stage_layout_without_a_loss": Wrong(
        layout={"pp": 2},
        world=2,
        model=transformer(pipeline_model_parallel_layout="Ett|tt"),
        says="pipeline_model_parallel_layout must begin with its one embedding and end with its "
        "one loss: embedding 1 times, loss 0 times, embedding first and decoder last; "
        "use E first and L last",
        mended={"model": transformer(pipeline_model_parallel_layout="Ett|ttL")},
    ),
    "a_stage_layout_of_other_predictions": Wrong(
        layout={"pp": 2},
        world=2,
        model=transformer(pipeline_model_parallel_layout="Ett|ttmL"),
        says="pipeline_model_parallel_layout must have mtp_num_layers layers of multi-token "
        "prediction: 1 of them, mtp_num_layers 0; "
        "use --model.transformer.mtp_num_layers 1, or 0 of them",
        mended={"model": transformer(pipeline_model_parallel_layout="Ett|ttmL", mtp_num_layers=1)},
    ),
    "a_stage_layout_that_predicts_too_early": Wrong(
        layout={"pp": 2},
        world=2,
        model=transformer(pipeline_model_parallel_layout="Ettm|ttL", mtp_num_layers=1),
        says="pipeline_model_parallel_layout must have all mtp layers in one stage, the last "
        "chunk of its rank, and after all decoder layers: in stages 0 of 2; "
        "use mL in the last stage",
        mended={"model": transformer(pipeline_model_parallel_layout="Ett|ttmL", mtp_num_layers=1)},
    ),
    "a_stage_layout_of_other_chunks": Wrong(
        layout={"pp": 2},
        world=2,
        model=transformer(pipeline_model_parallel_layout="Et|(t|)*2,tL"),
        says="pipeline_model_parallel_layout must have pp * vpp stages: "
        "4 stages, pp * vpp = 2 * 1; use --layout.pp 4, or --layout.vpp 2, or 2 stages",
        mended={"layout": {"vpp": 2}},
    ),
    "a_stage_layout_of_other_layers": Wrong(
        layout={"pp": 2},
        world=2,
        model=transformer(
            pipeline_model_parallel_layout=[["embedding", "decoder"], ["decoder", "loss"]]
        ),
        says="pipeline_model_parallel_layout must have num_layers decoder layers: "
        "2 of them, num_layers 4; use --model.num-layers 2, or 4 of them",
        mended={"model": {"num_layers": 2}},
    ),
    "expert_parallelism_without_experts": Wrong(
        layout={"ep": 2},
        world=2,
        says="ep above 1 needs num_moe_experts: ep 2, no experts; "
        "use --layout.ep 1, or --model.num-moe-experts 2",
        mended={"layout": {"ep": 1}},
    ),
    "expert_tensor_parallelism_without_experts": Wrong(
        layout={"etp": 2},
        world=2,
        says="etp above 1 needs num_moe_experts: etp 2, no experts; use --layout.etp 1",
        mended={"layout": {"etp": 1}},
    ),
    "a_width_of_experts_without_experts": Wrong(
        model=transformer(moe_ffn_hidden_size=32),
        says="moe_ffn_hidden_size needs num_moe_experts: moe_ffn_hidden_size 32, no experts; "
        "use a model without moe_ffn_hidden_size",
        mended={"model": {"num_moe_experts": 4}},
    ),
    "uneven_experts": Wrong(
        layout={"ep": 2},
        world=2,
        model={"num_moe_experts": 3},
        says="num_moe_experts must be a multiple of ep: num_moe_experts 3, ep 2; "
        "use --layout.ep 1 or 3, or --model.num-moe-experts 2 or 4",
        mended={"model": {"num_moe_experts": 4}},
    ),
    "more_experts_for_a_token_than_there_are": Wrong(
        model={"num_moe_experts": 1},
        says="moe_router_topk must not be above num_moe_experts: "
        "moe_router_topk 2, num_moe_experts 1; "
        "use --model.transformer.moe_router_topk 1, or --model.num-moe-experts 2",
        mended={"model": {"num_moe_experts": 2}},
    ),
    "one_expert_of_a_softmax": Wrong(
        model={"num_moe_experts": 4, **transformer(moe_router_topk=1)},
        says="moe_router_topk 1 needs moe_router_pre_softmax: "
        "moe_router_topk 1, moe_router_pre_softmax False; "
        "use --model.transformer.moe_router_pre_softmax True, "
        "or --model.transformer.moe_router_topk 2",
        mended={"model": transformer(moe_router_topk=1, moe_router_pre_softmax=True)},
    ),
    "shared_experts_that_overlap_with_an_all_gather": Wrong(
        model={
            "num_moe_experts": 4,
            **transformer(
                moe_shared_expert_intermediate_size=16,
                moe_shared_expert_overlap=True,
                add_bias_linear=False,
            ),
        },
        says="moe_shared_expert_overlap needs moe_token_dispatcher_type alltoall: "
        "moe_token_dispatcher_type allgather; "
        "use --model.transformer.moe_token_dispatcher_type alltoall, "
        "or --model.transformer.moe_shared_expert_overlap False",
        mended={
            "model": transformer(
                moe_shared_expert_intermediate_size=16,
                moe_shared_expert_overlap=True,
                moe_token_dispatcher_type="alltoall",
                add_bias_linear=False,
            )
        },
    ),
    "packed_documents_of_stages_that_gather": Wrong(
        layout={"pp": 2},
        world=2,
        model=transformer(moe_token_dispatcher_type="allgather", attention_dropout=0.0),
        data={"pack_documents": True},
        says="packed documents with pp above 1 need moe_token_dispatcher_type alltoall: "
        "moe_token_dispatcher_type allgather, pp 2; "
        "use --model.transformer.moe_token_dispatcher_type alltoall, or --layout.pp 1, "
        "or --data.pack-documents False",
        mended={"model": transformer(attention_dropout=0.0)},
    ),
    "an_uneven_expert_width": Wrong(
        layout={"etp": 2},
        world=2,
        model={
            "num_moe_experts": 4,
            **transformer(moe_ffn_hidden_size=15, add_bias_linear=False),
        },
        says="moe_ffn_hidden_size must be a multiple of etp: moe_ffn_hidden_size 15, etp 2; "
        "use --layout.etp 1 or 3, or --model.transformer.moe_ffn_hidden_size 14 or 16",
        mended={"layout": {"etp": 1}},
    ),
    "an_uneven_shared_expert": Wrong(
        layout={"tp": 2, "sp": True},
        world=2,
        model={
            "num_moe_experts": 4,
            **transformer(moe_shared_expert_intermediate_size=15, add_bias_linear=False),
        },
        says="moe_shared_expert_intermediate_size must be a multiple of tp: "
        "moe_shared_expert_intermediate_size 15, tp 2; use --layout.tp 1 or 3, "
        "or --model.transformer.moe_shared_expert_intermediate_size 14 or 16",
        mended={"model": MOE},
    ),
    "experts_without_sequence_parallelism": Wrong(
        layout={"tp": 2},
        world=2,
        model=MOE,
        says="experts with tp above 1 need sequence_parallel: num_moe_experts 4, tp 2; "
        "use --layout.sp True, or --layout.tp 1",
        mended={"layout": {"sp": True}},
    ),
    "split_experts_with_a_bias": Wrong(
        layout={"tp": 2, "sp": True},
        world=2,
        model={"num_moe_experts": 4},
        says="experts with etp above 1 must have no bias: etp 2, add_bias_linear True; "
        "use --layout.etp 1, or --model.transformer.add_bias_linear False",
        mended={"layout": {"etp": 1}},
    ),
    "shared_experts_with_a_bias": Wrong(
        model={"num_moe_experts": 4, **transformer(moe_shared_expert_intermediate_size=16)},
        says="shared experts must have no bias: "
        "moe_shared_expert_intermediate_size 16, add_bias_linear True; "
        "use --model.transformer.add_bias_linear False",
        mended={
            "model": transformer(moe_shared_expert_intermediate_size=16, add_bias_linear=False)
        },
    ),
    "a_model_too_short_for_the_data": Wrong(
        model={"max_sequence_length": 32},
        says="max_sequence_length must not be below sequence_length: "
        "max_sequence_length 32, sequence_length 64; "
        "use --model.max-sequence-length 64, or --data.sequence-length 32",
        mended={"model": {"max_sequence_length": 64}},
    ),
    "padding_in_the_auxiliary_loss": Wrong(
        layout={"cp": 2},
        world=2,
        model={
            "num_moe_experts": 4,
            "transformer": {"moe_aux_loss_coeff": 0.1, "attention_dropout": 0.0},
        },
        data={"sequence_length": 66},
        says="sequence_length must be a multiple of 2 * cp, "
        "or padded tokens count in moe_aux_loss_coeff: "
        "sequence_length 66, 2 * cp = 2 * 2 = 4; "
        "use --layout.cp 1 or 3, or --data.sequence-length 64 or 68",
        mended={"data": {"sequence_length": 68}},
    ),
    "padding_in_the_capacity_of_experts": Wrong(
        layout={"tp": 2, "cp": 4, "sp": True},
        world=8,
        model={
            "num_moe_experts": 4,
            "transformer": {
                "moe_expert_capacity_factor": 1.5,
                "add_bias_linear": False,
                "attention_dropout": 0.0,
            },
        },
        data={"sequence_length": 72},
        says="sequence_length must be a multiple of 2 * cp * tp, "
        "or padded tokens count in moe_expert_capacity_factor: "
        "sequence_length 72, 2 * cp * tp = 2 * 4 * 2 = 16; "
        "use --layout.cp 3 or 6, or --layout.tp 1 or 3, or --data.sequence-length 64 or 80",
        mended={"data": {"sequence_length": 80}},
    ),
    "padded_documents_in_the_auxiliary_loss": Wrong(
        layout={"cp": 2},
        world=2,
        model={
            "num_moe_experts": 4,
            "transformer": {"moe_aux_loss_coeff": 0.1, "attention_dropout": 0.0},
        },
        data={"pack_documents": True},
        says="packed documents are padded, which moe_aux_loss_coeff counts as tokens: "
        "each to a multiple of 4; "
        "use --data.pack-documents False, or a model without moe_aux_loss_coeff",
        mended={"data": {"pack_documents": False}},
    ),
    **(
        {}
        if megatron_core_is_before("0.17")
        else {
            "predicted_tokens_of_split_sequences": Wrong(
                layout={"cp": 2},
                world=2,
                model=transformer(mtp_num_layers=1, attention_dropout=0.0),
                says="with mtp_num_layers, Megatron-Core from 0.17 on needs cp 1, "
                "or gradients are off: mtp_num_layers 1, cp 2; "
                "use --layout.cp 1, or a model without mtp_num_layers",
                mended={"layout": {"cp": 1}},
            )
        }
    ),
    "packed_documents_with_attention_dropout": Wrong(
        data={"pack_documents": True},
        says="packed documents need attention_dropout 0: attention_dropout 0.1; "
        "use --model.transformer.attention_dropout 0, or --data.pack-documents False",
        mended={"model": {"transformer": {"attention_dropout": 0}}},
    ),
    "shared_sequences_with_attention_dropout": Wrong(
        layout={"cp": 2},
        world=2,
        says="cp above 1 needs attention_dropout 0, or --model.backend te: "
        "attention_dropout 0.1, cp 2; "
        "use --model.transformer.attention_dropout 0, or --layout.cp 1",
        mended={"model": transformer(attention_dropout=0.0)},
    ),
    "an_uneven_batch": Wrong(
        world=3,
        says="global_batch_size must be a multiple of micro_batch_size * dp: "
        "global_batch_size 32, micro_batch_size * dp = 4 * 3 = 12; "
        "use --data.global-batch-size 24 or 36",
        mended={"data": {"global_batch_size": 36}},
    ),
    "too_few_micro_batches_to_interleave": Wrong(
        layout={"pp": 2, "vpp": 2},
        world=2,
        data={"global_batch_size": 12},
        says="interleaving needs micro-batches in whole groups: "
        "micro-batches 12 / (4 * 1) = 3, group 2, pp 2; "
        "use --data.global-batch-size 8 or 16, or --data.micro-batch-size 3 or 6",
        mended={"data": {"global_batch_size": 16}},
    ),
    "a_last_group_of_micro_batches_below_the_stages": Wrong(
        layout={"pp": 2, "vpp": 2},
        world=2,
        model=transformer(microbatch_group_size_per_vp_stage=3),
        data={"global_batch_size": 16},
        says="interleaving needs micro-batches in whole groups, or a rest of pp or more: "
        "micro-batches 16 / (4 * 1) = 4, group 3, pp 2; "
        "use --data.global-batch-size 12 or 20, or --data.micro-batch-size 2",
        mended={"data": {"global_batch_size": 20}},
    ),
    "an_unknown_recomputation": Wrong(
        model=transformer(recompute_granularity="some"),
        says="recompute_granularity must be of full, selective: recompute_granularity some; "
        "use --model.transformer.recompute_granularity full or selective",
        mended={"model": transformer()},
    ),
    "recomputed_layers_without_a_number": Wrong(
        model=transformer(recompute_granularity="full", recompute_method="block"),
        says="recompute_granularity full needs recompute_method and recompute_num_layers: "
        "recompute_method block, recompute_num_layers None; "
        "use --model.transformer.recompute_num_layers 1",
        mended={"model": transformer()},
    ),
    "recomputed_modules_of_a_number_of_layers": Wrong(
        model=transformer(recompute_granularity="selective", recompute_num_layers=2),
        says="recompute_granularity selective takes no recompute_num_layers: "
        "recompute_num_layers 2; use a model without recompute_num_layers, "
        "or --model.transformer.recompute_granularity full",
        mended={"model": transformer(recompute_granularity="selective")},
    ),
    "recomputation_in_steps_of_no_layers": Wrong(
        model=transformer(**UNIFORM, recompute_num_layers=0),
        says="recompute_num_layers of uniform recomputation must divide the layers of each stage: "
        "recompute_num_layers 0, layers of a stage 4; "
        "use --model.transformer.recompute_num_layers 1",
        mended={"model": transformer(**UNIFORM, recompute_num_layers=2)},
    ),
    "predicted_tokens_that_are_recomputed_in_pairs": Wrong(
        model=transformer(**UNIFORM, recompute_num_layers=2, mtp_num_layers=1),
        says="recompute_num_layers of uniform recomputation must divide the layers of each stage, "
        "and be 1 with mtp_num_layers: recompute_num_layers 2, layers of a stage 4; "
        "use --model.transformer.recompute_num_layers 1",
        mended={"model": transformer(**UNIFORM, recompute_num_layers=1, mtp_num_layers=1)},
    ),
    "an_unknown_module": Wrong(
        model=transformer(recompute_granularity="selective", recompute_modules=["mlp_up"]),
        says="recompute_modules must be of core_attn, layernorm, mla_up_proj, mlp, moe, moe_act, "
        f"shared_experts{GATED_DELTA}: recompute_modules mlp_up; "
        "use --model.transformer.recompute_modules core_attn or layernorm or mla_up_proj or mlp or "
        f"moe or moe_act or shared_experts{GATED_DELTA.replace(', ', ' or ')}",
        mended={"model": transformer()},
    ),
    "a_module_that_is_not_in_the_model": Wrong(
        model=transformer(recompute_granularity="selective", recompute_modules=["mla_up_proj"]),
        says="mla_up_proj can be recomputed only with multi_latent_attention True: "
        "recompute_modules mla_up_proj, multi_latent_attention False; "
        "use --model.transformer.multi_latent_attention True, "
        "or recompute_modules without mla_up_proj",
        mended={"model": transformer()},
    ),
    "saved_activations_that_are_split_twice": Wrong(
        layout={"tp": 2, "sp": True},
        world=2,
        model=transformer(**UNIFORM, recompute_num_layers=1, distribute_saved_activations=True),
        says="distribute_saved_activations is not for sequence_parallel: "
        "distribute_saved_activations True, sequence_parallel True; "
        "use --model.transformer.distribute_saved_activations False, or --layout.sp False",
        mended={"layout": {"tp": 2, "sp": False}},
    ),
    "a_recomputed_mlp_with_a_bias": Wrong(
        model=transformer(
            recompute_granularity="selective", recompute_modules=["core_attn", "mlp"]
        ),
        says="a recomputed mlp must have no bias, or its backward pass never ends: "
        "recompute_modules core_attn, mlp, add_bias_linear True; "
        "use --model.transformer.add_bias_linear False, or recompute_modules without mlp",
        mended={
            "model": transformer(
                recompute_granularity="selective",
                recompute_modules=["core_attn", "mlp"],
                add_bias_linear=False,
            )
        },
    ),
    "a_group_of_micro_batches_below_the_stages": Wrong(
        layout={"pp": 2, "vpp": 2},
        world=2,
        model=transformer(microbatch_group_size_per_vp_stage=1),
        says="microbatch_group_size_per_vp_stage must not be below pp: "
        "microbatch_group_size_per_vp_stage 1, pp 2; "
        "use --model.transformer.microbatch_group_size_per_vp_stage 2",
        mended={"model": transformer(microbatch_group_size_per_vp_stage=2)},
    ),
}
