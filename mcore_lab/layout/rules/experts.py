"""Rules of mixtures of experts: expert and expert-tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator

from mcore_lab.compat import megatron_core_is_before
from mcore_lab.layout.rules.case import Case, Rule
from mcore_lab.layout.rules.report import BrokenRule, either, multiple_of

_DEFAULT_TOPK = 2
"""`TransformerConfig.moe_router_topk`, if it is not set."""
_DEFAULT_DISPATCHER = "allgather"
"""`TransformerConfig.moe_token_dispatcher_type`, if it is not set."""


def expert_sizes_have_experts(case: Case) -> Iterator[BrokenRule]:
    """Without experts there is nothing to split by ep, and no width of theirs."""
    if case.model.num_moe_experts:
        return
    layout = case.layout
    if layout.ep > 1:
        yield BrokenRule(
            rule="ep above 1 needs num_moe_experts",
            numbers=f"ep {layout.ep}, no experts",
            fix=f"--layout.ep 1, or --model.num-moe-experts {layout.ep}",
        )
    width, frequency = case.of_model("moe_ffn_hidden_size"), case.of_model("moe_layer_freq", 1)
    some_dense = 0 in frequency if isinstance(frequency, (list, tuple)) else frequency > 1
    if width and not (some_dense and not megatron_core_is_before("0.17")):
        yield BrokenRule(
            rule="moe_ffn_hidden_size needs num_moe_experts",
            numbers=f"moe_ffn_hidden_size {width}, no experts",
            fix="a model without moe_ffn_hidden_size",
        )


def expert_tensor_size_has_experts(case: Case) -> Iterator[BrokenRule]:
    """Without experts there is nothing to split by etp, which Megatron-Core would leave unsaid."""
    layout = case.layout
    if not case.model.num_moe_experts and layout.etp not in (1, layout.tp):
        yield BrokenRule(
            rule="etp above 1 needs num_moe_experts",
            numbers=f"etp {layout.etp}, no experts",
            fix="--layout.etp 1",
        )


def experts_split(case: Case) -> Iterator[BrokenRule]:
    """Each expert-parallel rank has whole experts, and as many."""
    if case.model.num_moe_experts:
        yield from multiple_of(case.layout, case.model_amount("num_moe_experts"), ("ep",))


def router_has_enough_experts(case: Case) -> Iterator[BrokenRule]:
    """A token goes to no more experts than there are."""
    experts = case.model.num_moe_experts
    topk = case.model_amount("moe_router_topk", default=_DEFAULT_TOPK)
    if experts and topk.value > experts:
        yield BrokenRule(
            rule="moe_router_topk must not be above num_moe_experts",
            numbers=f"moe_router_topk {topk.value}, num_moe_experts {experts}",
            fix=either(
                topk.setting.format(experts),
                case.model_amount("num_moe_experts").setting.format(topk.value),
            ),
        )


def routers_of_one_expert_learn(case: Case) -> Iterator[BrokenRule]:
    """A softmax over the one expert that was chosen is 1: the router would have no gradient.

    `TransformerConfig` refuses it, of models without experts too.
    """
    single = case.of_model("moe_router_topk", _DEFAULT_TOPK) == 1
    scored_after = not case.of_model("moe_router_pre_softmax", False)
    is_softmax = case.of_model("moe_router_score_function", "softmax") == "softmax"
    sinkhorn = case.of_model("moe_router_load_balancing_type") == "sinkhorn"
    if single and is_softmax and scored_after and not sinkhorn:
        yield BrokenRule(
            rule="moe_router_topk 1 needs moe_router_pre_softmax",
            numbers="moe_router_topk 1, moe_router_pre_softmax False",
            fix="--model.transformer.moe_router_pre_softmax True, "
            "or --model.transformer.moe_router_topk 2",
        )


def dispatcher_takes_what_is_asked(case: Case) -> Iterator[BrokenRule]:
    """Shared experts overlap with an all-to-all, and rows of other lengths are no all-gather's.

    Packed documents give rows of other lengths; stages are told how long each is.
    """
    dispatcher = case.of_model("moe_token_dispatcher_type")
    shared = case.of_model("moe_shared_expert_intermediate_size")
    if shared and case.of_model("moe_shared_expert_overlap") and dispatcher != "alltoall":
        yield BrokenRule(
            rule="moe_shared_expert_overlap needs moe_token_dispatcher_type alltoall",
            numbers=f"moe_token_dispatcher_type {dispatcher or _DEFAULT_DISPATCHER}",
            fix="--model.transformer.moe_token_dispatcher_type alltoall, "
            "or --model.transformer.moe_shared_expert_overlap False",
        )
    if case.data.pack_documents and case.layout.pp > 1 and dispatcher == "allgather":
        yield BrokenRule(
            rule="packed documents with pp above 1 need moe_token_dispatcher_type alltoall",
            numbers=f"moe_token_dispatcher_type allgather, pp {case.layout.pp}",
            fix="--model.transformer.moe_token_dispatcher_type alltoall, or --layout.pp 1, "
            "or --data.pack-documents False",
        )


def expert_width_splits(case: Case) -> Iterator[BrokenRule]:
    """The width of each expert is split evenly over expert-tensor-parallel ranks."""
    if case.model.num_moe_experts:
        dense = case.of_model("ffn_hidden_size", 4 * case.model.hidden_size)
        width = case.model_amount("moe_ffn_hidden_size", default=dense)
        yield from multiple_of(case.layout, width, ("etp",))


def shared_expert_width_splits(case: Case) -> Iterator[BrokenRule]:
    """Shared experts are split as a dense layer is."""
    width = case.model_amount("moe_shared_expert_intermediate_size")
    if case.model.num_moe_experts:
        yield from multiple_of(case.layout, width, ("tp",))


def experts_need_sequence_parallelism(case: Case) -> Iterator[BrokenRule]:
    """Experts are trained on tokens split over tensor-parallel ranks: `MoELayer` refuses others."""
    layout = case.layout
    if case.model.num_moe_experts and layout.tp > 1 and not layout.sp:
        yield BrokenRule(
            rule="experts with tp above 1 need sequence_parallel",
            numbers=f"num_moe_experts {case.model.num_moe_experts}, tp {layout.tp}",
            fix="--layout.sp True, or --layout.tp 1",
        )


def split_experts_have_no_bias(case: Case) -> Iterator[BrokenRule]:
    """Experts that are split have no bias: `TransformerConfig` refuses its own default."""
    bias = case.of_model("add_bias_linear", True)
    if case.model.num_moe_experts and bias and case.layout.etp > 1:
        yield BrokenRule(
            rule="experts with etp above 1 must have no bias",
            numbers=f"etp {case.layout.etp}, add_bias_linear True",
            fix="--layout.etp 1, or --model.transformer.add_bias_linear False",
        )


def shared_experts_have_no_bias(case: Case) -> Iterator[BrokenRule]:
    """Shared experts have no bias, whether split or not: `SharedExpertMLP` refuses it."""
    width = case.of_model("moe_shared_expert_intermediate_size")
    if case.model.num_moe_experts and width and case.of_model("add_bias_linear", True):
        yield BrokenRule(
            rule="shared experts must have no bias",
            numbers=f"moe_shared_expert_intermediate_size {width}, add_bias_linear True",
            fix="--model.transformer.add_bias_linear False",
        )


RULES: tuple[Rule, ...] = (
    expert_sizes_have_experts,
    expert_tensor_size_has_experts,
    experts_split,
    router_has_enough_experts,
    routers_of_one_expert_learn,
    dispatcher_takes_what_is_asked,
    expert_width_splits,
    shared_expert_width_splits,
    experts_need_sequence_parallelism,
    split_experts_have_no_bias,
    shared_experts_have_no_bias,
)
