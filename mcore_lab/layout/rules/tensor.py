"""Rules of tensor and sequence parallelism: what each weight matrix is split by."""

from __future__ import annotations

from collections.abc import Iterator

from mcore_lab.layout.rules.case import Case, Rule
from mcore_lab.layout.rules.report import (
    Amount,
    BrokenRule,
    either,
    multiple_of,
    nearest_values,
    other_amounts,
    other_sizes,
)


def heads_split(case: Case) -> Iterator[BrokenRule]:
    """Each tensor-parallel rank has whole attention heads."""
    yield from multiple_of(case.layout, case.model_amount("num_attention_heads"), ("tp",))


def heads_share_query_groups(case: Case) -> Iterator[BrokenRule]:
    """Each query group serves the same number of attention heads."""
    heads, groups = case.model_amount("num_attention_heads"), _query_groups(case)
    if heads.value % groups.value:
        yield BrokenRule(
            rule="num_attention_heads must be a multiple of num_query_groups",
            numbers=f"num_attention_heads {heads.value}, num_query_groups {groups.value}",
            fix=either(
                other_amounts(groups, lambda n: heads.value % n == 0, most=heads.value),
                other_amounts(heads, lambda n: n % groups.value == 0),
            ),
        )


def query_groups_split(case: Case) -> Iterator[BrokenRule]:
    """Tensor-parallel ranks have whole query groups each, or whole groups of ranks share one."""
    layout, groups, heads = case.layout, _query_groups(case), case.model.num_attention_heads

    def split(n: int, tp: int) -> bool:
        return heads % n == 0 and (n % tp == 0 or tp % n == 0)

    same_as_heads = case.model.num_query_groups is None
    if same_as_heads or groups.value % layout.tp == 0 or layout.tp % groups.value == 0:
        return
    yield BrokenRule(
        rule="num_query_groups must be a multiple or a divisor of tp",
        numbers=f"num_query_groups {groups.value}, tp {layout.tp}",
        fix=either(
            *other_sizes(layout, ("tp",), lambda other: split(groups.value, other.tp)),
            other_amounts(groups, lambda n: split(n, layout.tp), most=heads),
        ),
    )


def shared_query_groups_split(case: Case) -> Iterator[BrokenRule]:
    """Where ranks share a query group, the one weight of queries, keys and values still splits."""
    layout, groups = case.layout, _query_groups(case)
    heads = case.model.num_attention_heads
    channels = case.of_model("kv_channels", case.model.hidden_size // heads)

    def splits(n: int, tp: int) -> bool:
        whole = heads % tp == 0 and (n % tp == 0 or tp % n == 0)
        return whole and (heads + 2 * n) * channels % tp == 0

    shared = layout.tp % groups.value == 0 and not case.of_model("multi_latent_attention")
    if not shared or (heads + 2 * groups.value) * channels % layout.tp == 0:
        return
    yield BrokenRule(
        rule="(num_attention_heads + 2 * num_query_groups) * kv_channels must be a multiple of tp",
        numbers=f"({heads} + 2 * {groups.value}) * {channels} = "
        f"{(heads + 2 * groups.value) * channels}, tp {layout.tp}",
        fix=either(
            *other_sizes(layout, ("tp",), lambda other: splits(groups.value, other.tp)),
            other_amounts(groups, lambda n: splits(n, layout.tp), most=heads),
        ),
    )


def heads_fill_the_hidden_size(case: Case) -> Iterator[BrokenRule]:
    """Heads are as wide together as the hidden size, which Megatron-Core would round down to."""
    if case.of_model("kv_channels") or case.of_model("multi_latent_attention"):
        return
    hidden, heads = case.model_amount("hidden_size"), case.model_amount("num_attention_heads")
    if hidden.value % heads.value:
        yield BrokenRule(
            rule="hidden_size must be a multiple of num_attention_heads, or kv_channels set",
            numbers=f"hidden_size {hidden.value}, num_attention_heads {heads.value}",
            fix=either(
                other_amounts(heads, lambda n: hidden.value % n == 0, most=hidden.value),
                other_amounts(hidden, lambda n: n % heads.value == 0),
            ),
        )


def feed_forward_splits(case: Case) -> Iterator[BrokenRule]:
    """The width of dense feed-forward layers is split evenly."""
    frequency = case.of_model("moe_layer_freq", 1)
    if case.model.num_moe_experts and (frequency == 1 or _all_ones(frequency)):
        return
    width = case.model_amount("ffn_hidden_size", default=4 * case.model.hidden_size)
    yield from multiple_of(case.layout, width, ("tp",))


def vocabulary_splits(case: Case) -> Iterator[BrokenRule]:
    """Each tensor-parallel rank has as many rows of the embedding."""
    yield from multiple_of(case.layout, case.model_amount("vocab_size"), ("tp",))


def sequence_parallelism_has_ranks(case: Case) -> Iterator[BrokenRule]:
    """Sequence parallelism splits over tensor-parallel ranks: `ModelParallelConfig` refuses one."""
    if case.layout.sp and case.layout.tp == 1:
        heads = case.model.num_attention_heads
        larger = nearest_values(1, lambda n: heads % n == 0, heads)
        yield BrokenRule(
            rule="sequence_parallel needs tp above 1",
            numbers="tp 1",
            fix=either("--layout.sp False", *(f"--layout.tp {tp}" for tp in larger)),
        )


def _query_groups(case: Case) -> Amount:
    return case.model_amount("num_query_groups", default=case.model.num_attention_heads)


def _all_ones(frequency: object) -> bool:
    return isinstance(frequency, (list, tuple)) and all(n == 1 for n in frequency)


RULES: tuple[Rule, ...] = (
    heads_split,
    heads_share_query_groups,
    query_groups_split,
    shared_query_groups_split,
    heads_fill_the_hidden_size,
    feed_forward_splits,
    vocabulary_splits,
    sequence_parallelism_has_ranks,
)
