"""Rules of the data: how sequences and batches are split over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mcore_lab.compat import megatron_core_is_before
from mcore_lab.layout.rules.case import Case, Rule
from mcore_lab.layout.rules.report import (
    BrokenRule,
    either,
    multiple_of,
    other_amounts,
)

if TYPE_CHECKING:
    from mcore_lab.layout.parallel import ParallelLayout

_ATTENTION_DROPOUT = 0.1
"""`TransformerConfig.attention_dropout`, if it is not set."""
_ON_ALL_TOKENS = (
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_expert_capacity_factor",
    "moe_router_enable_expert_bias",
)
_LEARNED = "learned_absolute"
_GROUP = "microbatch_group_size_per_vp_stage"


def sequence_fits_the_model(case: Case) -> Iterator[BrokenRule]:
    """The model has a learned position for each token of a sequence; others need no table."""
    if case.of_model("position_embedding_type", _LEARNED) != _LEARNED:
        return
    longest = case.model_amount("max_sequence_length")
    length = case.data_amount("sequence_length")
    if 0 < longest.value < length.value:
        yield BrokenRule(
            rule="max_sequence_length must not be below sequence_length",
            numbers=f"max_sequence_length {longest.value}, sequence_length {length.value}",
            fix=either(longest.setting.format(length.value), length.setting.format(longest.value)),
        )


def experts_count_no_padding(case: Case) -> Iterator[BrokenRule]:
    """Sequences need no padding where experts would count it among their tokens.

    What does not divide is padded, and padding is left out of the loss; but it is routed, and
    whatever looks at all tokens of a router looks at padding too.
    """
    layout, counting = case.layout, _counts_tokens(case)
    if not case.model.num_moe_experts or not counting or layout.sequence_multiple == 1:
        return
    if case.data.pack_documents:
        yield BrokenRule(
            rule=f"packed documents are padded, which {counting} counts as tokens",
            numbers=f"each to a multiple of {layout.sequence_multiple}",
            fix=f"--data.pack-documents False, or a model without {counting}",
        )
        return

    def splits(length: int, other: ParallelLayout) -> bool:
        return length % other.sequence_multiple == 0

    yield from multiple_of(
        layout,
        case.data_amount("sequence_length"),
        ["cp"] * (layout.cp > 1) + ["tp"] * layout.sp,
        factor=2 if layout.cp > 1 else 1,
        works=splits,
        note=f", or padded tokens count in {counting}",
    )


def full_attention_sees_no_others(case: Case) -> Iterator[BrokenRule]:
    """Where a token sees all of its row, the row is one sequence and holds no padding.

    Nor is the next token to be predicted there: it would be seen.
    """
    if case.of_model("causal_attention", True):
        return
    causal = "--model.causal-attention True"
    if case.data.pack_documents:
        yield BrokenRule(
            rule="packed documents need causal attention, or they would see their padding",
            numbers="causal_attention False, pack_documents True",
            fix=either(causal, "--data.pack-documents False"),
        )
    elif case.data.sequence_length % case.layout.sequence_multiple:
        yield from multiple_of(
            case.layout,
            case.data_amount("sequence_length"),
            ["cp"] * (case.layout.cp > 1) + ["tp"] * case.layout.sp,
            factor=2 if case.layout.cp > 1 else 1,
            note=", or attention that is not causal sees padding",
        )
    if tokens := case.of_model("mtp_num_layers"):
        yield BrokenRule(
            rule="mtp_num_layers needs causal attention, or what is predicted would be seen",
            numbers=f"causal_attention False, mtp_num_layers {tokens}",
            fix=either(causal, "a model without mtp_num_layers"),
        )


def predicted_tokens_see_whole_sequences(case: Case) -> Iterator[BrokenRule]:
    """Several predicted tokens and context parallelism are right together before 0.17 only.

    From then on the loss of each is divided by the tokens that a rank has, and not by those that
    all ranks have: its gradients are off by percents. Source: Megatron-LM #7498.
    """
    tokens = case.of_model("mtp_num_layers")
    if tokens and case.layout.cp > 1 and not megatron_core_is_before("0.17"):
        yield BrokenRule(
            rule="with mtp_num_layers, Megatron-Core from 0.17 on needs cp 1, or gradients are off",
            numbers=f"mtp_num_layers {tokens}, cp {case.layout.cp}",
            fix="--layout.cp 1, or a model without mtp_num_layers",
        )


def packed_documents_drop_no_attention(case: Case) -> Iterator[BrokenRule]:
    """The torch backend attends to packed documents without dropout; Transformer Engine with it."""
    if case.data.pack_documents and (dropout := _own_attention_drops(case)):
        yield BrokenRule(
            rule="packed documents need attention_dropout 0",
            numbers=f"attention_dropout {dropout}",
            fix="--model.transformer.attention_dropout 0, or --data.pack-documents False",
        )


def shared_sequences_drop_no_attention(case: Case) -> Iterator[BrokenRule]:
    """The torch backend shares sequences without dropout, too; Transformer Engine with it."""
    if case.layout.cp > 1 and (dropout := _own_attention_drops(case)):
        yield BrokenRule(
            rule="cp above 1 needs attention_dropout 0, or --model.backend te",
            numbers=f"attention_dropout {dropout}, cp {case.layout.cp}",
            fix="--model.transformer.attention_dropout 0, or --layout.cp 1",
        )


def batch_divides(case: Case) -> Iterator[BrokenRule]:
    """A global batch is a whole number of micro-batches on every replica."""
    batch, micro = case.data_amount("global_batch_size"), case.data_amount("micro_batch_size")
    dp = _replicas(case)
    if not dp or batch.value % (micro.value * dp) == 0:
        return
    yield BrokenRule(
        rule="global_batch_size must be a multiple of micro_batch_size * dp",
        numbers=f"global_batch_size {batch.value}, micro_batch_size * dp = "
        f"{micro.value} * {dp} = {micro.value * dp}",
        fix=either(
            other_amounts(batch, lambda n: _batch_fits(case, n, micro.value, dp)),
            other_amounts(micro, lambda n: _batch_fits(case, batch.value, n, dp), batch.value),
        ),
    )


def micro_batch_groups_reach_all_stages(case: Case) -> Iterator[BrokenRule]:
    """Interleaving takes at least as many micro-batches at a time as there are stages."""
    group, pp = case.model_amount(_GROUP, default=case.layout.pp), case.layout.pp
    if case.layout.vpp > 1 and group.value < pp:
        yield BrokenRule(
            rule=f"{_GROUP} must not be below pp",
            numbers=f"{_GROUP} {group.value}, pp {pp}",
            fix=group.setting.format(pp),
        )


def interleaving_has_micro_batches(case: Case) -> Iterator[BrokenRule]:
    """The interleaved schedule takes micro-batches in whole groups, of pp if no size is set."""
    batch, micro = case.data_amount("global_batch_size"), case.data_amount("micro_batch_size")
    dp, group = _replicas(case), _micro_batch_group(case)
    if not dp or batch.value % (micro.value * dp):
        return
    count = batch.value // (micro.value * dp)
    if _micro_batches_fit(case, count):
        return
    rest = "" if group == case.layout.pp else ", or a rest of pp or more"
    yield BrokenRule(
        rule=f"interleaving needs micro-batches in whole groups{rest}",
        numbers=f"micro-batches {batch.value} / ({micro.value} * {dp}) = {count}, group {group}, "
        f"pp {case.layout.pp}",
        fix=either(
            other_amounts(batch, lambda n: _batch_fits(case, n, micro.value, dp)),
            other_amounts(micro, lambda n: _batch_fits(case, batch.value, n, dp), batch.value),
        ),
    )


def _own_attention_drops(case: Case) -> float:
    """Return the dropout that the torch backend's attention is to have; 0 if that is not used."""
    dropout: float = case.of_model("attention_dropout", _ATTENTION_DROPOUT)
    return 0 if case.of_model("backend") == "te" else dropout


def _counts_tokens(case: Case) -> str:
    """Name what looks at all tokens that a router sees, if anything does."""
    if case.of_model("moe_router_load_balancing_type") == "sinkhorn":
        return "moe_router_load_balancing_type sinkhorn"
    return next((name for name in _ON_ALL_TOKENS if _is_on(case.of_model(name))), "")


def _is_on(value: object) -> bool:
    return any(value) if isinstance(value, (list, tuple)) else bool(value)


def _replicas(case: Case) -> int | None:
    """Return dp, or nothing where the world is not a whole number of replicas."""
    dp, rest = divmod(case.world_size, case.layout.tp * case.layout.cp * case.layout.pp)
    return None if rest else dp


def _batch_fits(case: Case, batch: int, micro: int, dp: int) -> bool:
    count, rest = divmod(batch, micro * dp)
    return rest == 0 and _micro_batches_fit(case, count)


def _micro_batches_fit(case: Case, count: int) -> bool:
    if case.layout.vpp == 1 or case.layout.pp == 1:
        return True
    group = _micro_batch_group(case)
    return count >= group and (count % group == 0 or count % group >= case.layout.pp)


def _micro_batch_group(case: Case) -> int:
    group: int = case.of_model(_GROUP, case.layout.pp)
    return max(group, case.layout.pp)


RULES: tuple[Rule, ...] = (
    sequence_fits_the_model,
    experts_count_no_padding,
    full_attention_sees_no_others,
    predicted_tokens_see_whole_sequences,
    packed_documents_drop_no_attention,
    shared_sequences_drop_no_attention,
    batch_divides,
    micro_batch_groups_reach_all_stages,
    interleaving_has_micro_batches,
)
