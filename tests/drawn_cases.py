"""Cases for hypothesis to draw: sizes that fit each other, then a few values that may not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from layout_cases import Data, Model, layout_of

from mcore_lab.layout.rules.case import Case

few = st.sampled_from([1, 1, 2, 3, 4])

_ORDERS = ["tp-pp-cp-ep-dp", "tp-cp-ep-pp-dp", "pp-dp-ep-cp-tp", "tp-cp-dp-pp", "tp-cp-ep-xp-dp-pp"]
_STAGES = ["Et|(t|)*2,tL", "Et*6|t*6L", "Et*6|t*6mL", "Et*3|(t*3|)*2t*3L", "Et*3|(t*3|)*2t*3mL"]
_MODULES = ["mlp", "layernorm", "moe", "moe_act", "shared_experts", "mla_up_proj", "all"]
_DISPATCHERS = ["allgather", "alltoall"]

_RECOMPUTED = [
    {"recompute_granularity": "selective"},
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
]

_MODEL = {"num_layers": 12, "num_attention_heads": 12, "hidden_size": 48, "vocab_size": 96}

Change = dict[str, list[Any]]
"""Fields, each with the values of which it takes one."""

UNUSUAL: list[Change] = [
    {"layout.tp": [0], "model.num_layers": [0, 12]},
    {"layout.tp": [5]},
    {"layout.sp": [True, False]},
    {"layout.vpp": [2, 3]},
    {"layout.ep": [2, 3, 5]},
    {"layout.etp": [2, 3, 4]},
    {"layout.order": _ORDERS},
    {"world.ranks": [1, 3, 6, 7]},
    {"model.num_layers": [1, 10, 11, 18]},
    {"model.num_attention_heads": [5, 8, 10]},
    {"model.num_attention_heads": [8, 16], "model.hidden_size": [64]},
    {"model.num_query_groups": [1, 2, 4]},
    {"model.num_query_groups": [5, 8]},
    {"model.num_query_groups": [1], "transformer.kv_channels": [1], "layout.tp": [4]},
    {"model.hidden_size": [50, 60]},
    {"model.ffn_hidden_size": [36, 50]},
    {"model.vocab_size": [48, 50]},
    {"model.num_moe_experts": [None, 1, 4, 9]},
    {"model.max_sequence_length": [12, 24, 100]},
    {"model.max_sequence_length": [24], "model.position_embedding_type": ["rope"]},
    {"model.causal_attention": [False], "data.sequence_length": [22, 48]},
    {"model.causal_attention": [False], "transformer.mtp_num_layers": [1]},
    {"model.share_embeddings_and_output_weights": [True]},
    {"model.share_embeddings_and_output_weights": [True], "transformer.mtp_num_layers": [1]},
    {"data.sequence_length": [22, 50]},
    {"data.sequence_length": [22, 50], "transformer.moe_aux_loss_coeff": [0.1]},
    {"data.micro_batch_size": [3, 5]},
    {"data.global_batch_size": [10, 36, 100]},
    {"data.pack_documents": [True]},
    {"data.pack_documents": [True], "transformer.attention_dropout": [0.1]},
    {"data.pack_documents": [True], "transformer.moe_expert_capacity_factor": [1.5]},
    {"data.pack_documents": [True], "transformer.moe_token_dispatcher_type": _DISPATCHERS},
    {"transformer.add_bias_linear": [True, False]},
    {"transformer.attention_dropout": [0.1]},
    {"transformer.kv_channels": [1, 2, 8]},
    {"transformer.tensor_model_parallel_size": [2]},
    {"transformer.overlap_p2p_comm": [True, False]},
    {"transformer.overlap_p2p_comm": [True], "layout.pp": [2], "layout.vpp": [1]},
    {"transformer.overlap_p2p_comm": [False], "transformer.batch_p2p_comm": [True]},
    {"transformer.batch_p2p_comm": [True]},
    {
        "transformer.microbatch_group_size_per_vp_stage": [1, 3, 5],
        "layout.pp": [2],
        "layout.vpp": [2],
    },
    {"transformer.num_layers_in_first_pipeline_stage": [2, 4, 6]},
    {"transformer.num_layers_in_last_pipeline_stage": [2, 4, 6]},
    {
        "transformer.num_layers_in_first_pipeline_stage": [2, 3, 6],
        "transformer.num_layers_in_last_pipeline_stage": [2, 4, 6],
    },
    {"transformer.account_for_embedding_in_pipeline_split": [True], "model.num_layers": [11, 12]},
    {
        "transformer.account_for_embedding_in_pipeline_split": [True],
        "transformer.account_for_loss_in_pipeline_split": [True],
        "model.num_layers": [10, 12],
    },
    {"transformer.pipeline_model_parallel_layout": _STAGES},
    {"transformer.pipeline_model_parallel_layout": _STAGES, "transformer.mtp_num_layers": [1]},
    {"transformer.mtp_num_layers": [1, 2]},
    {"transformer.mtp_num_layers": [1], "layout.cp": [2]},
    {"transformer.moe_router_topk": [1, 4, 13]},
    {"transformer.moe_router_topk": [1], "transformer.moe_router_pre_softmax": [True]},
    {"transformer.moe_ffn_hidden_size": [36, 50]},
    {"transformer.moe_ffn_hidden_size": [50], "layout.etp": [3, 4]},
    {"transformer.moe_shared_expert_intermediate_size": [24, 50]},
    {
        "transformer.moe_shared_expert_intermediate_size": [24],
        "transformer.add_bias_linear": [True, False],
    },
    {
        "transformer.moe_shared_expert_intermediate_size": [24],
        "transformer.moe_shared_expert_overlap": [True],
        "transformer.moe_token_dispatcher_type": _DISPATCHERS,
    },
    {"transformer.moe_token_dispatcher_type": _DISPATCHERS},
    {"transformer.moe_aux_loss_coeff": [0.1]},
    {"transformer.recompute_granularity": ["full", "selective", "some"]},
    {
        "transformer.recompute_granularity": ["full"],
        "transformer.recompute_method": ["uniform"],
        "transformer.recompute_num_layers": [0, 1, 3, 5],
    },
    {"transformer.recompute_method": ["uniform", "block", "every"]},
    {"transformer.recompute_num_layers": [1, 2]},
    {
        "transformer.recompute_granularity": ["selective"],
        "transformer.recompute_modules": [["core_attn", module] for module in _MODULES],
        "transformer.moe_grouped_gemm": [True, False],
    },
    {
        "transformer.recompute_granularity": ["selective"],
        "transformer.distribute_saved_activations": [True],
    },
]


@st.composite
def cases(draw: st.DrawFn, unusual: Change) -> Case:
    """Draw a case of sizes that fit, with these unusual values and those of up to two others."""
    others = draw(st.lists(st.sampled_from(UNUSUAL), max_size=2))
    changed = {
        name: draw(st.sampled_from(values))
        for change in (*others, unusual)
        for name, values in change.items()
    }
    experts = draw(st.sampled_from([None, 12]))
    layout = _with_changes("layout", _layout(draw, experts is not None), changed)
    dense = layout["tp"] * layout["cp"]
    of_experts = layout.get("ep", 1) * (layout.get("etp", layout["tp"]) if experts else 1)
    replicas = draw(st.sampled_from([1, 2])) * (
        math.lcm(dense, of_experts) // dense if dense else 1
    )
    transformer = {"attention_dropout": 0.0, "add_bias_linear": experts is None}
    transformer |= {"moe_grouped_gemm": True} if experts else {}
    transformer |= draw(st.sampled_from([{}, {}, {}, {}, *_RECOMPUTED]))
    data = {"sequence_length": 48, "micro_batch_size": 1, "global_batch_size": 12 * replicas}
    return Case(
        layout=replace(layout_of(**layout), use_distributed_optimizer=draw(st.booleans())),
        model=Model(
            **_with_changes("model", {**_MODEL, "num_moe_experts": experts}, changed),
            transformer=_with_changes("transformer", transformer, changed),
        ),
        data=Data(**_with_changes("data", data, changed)),
        world_size=changed.get("world.ranks", layout["pp"] * dense * replicas),
    )


def _layout(draw: st.DrawFn, has_experts: bool) -> dict[str, Any]:
    sizes = {"tp": draw(few), "cp": draw(st.sampled_from([1, 1, 2, 3]))}
    sizes["pp"] = draw(st.sampled_from([1, 2, 3]))
    sizes["vpp"] = draw(st.sampled_from([1, 2])) if sizes["pp"] > 1 else 1
    if has_experts:
        sizes |= {"ep": draw(few), "etp": draw(few)}
    return {**sizes, "sp": sizes["tp"] > 1 and (has_experts or draw(st.booleans()))}


def _with_changes(part: str, values: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    own = {name.partition(".")[2]: v for name, v in changed.items() if name.startswith(f"{part}.")}
    return {**values, **own}
