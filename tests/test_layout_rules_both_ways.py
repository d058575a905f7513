"""What `check` passes Megatron-Core takes, and what it refuses Megatron-Core refuses or gets wrong.

A property of cases that hypothesis draws: layouts, models, data and recomputation together.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
from drawn_cases import UNUSUAL, cases
from hypothesis import given, seed, settings
from megatron_refuses import refusal

from mcore_lab.compat import megatron_core_is_before
from mcore_lab.layout.rules import RULES, world
from mcore_lab.layout.rules.case import Case

pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLES = 8
"""Cases that are drawn for each unusual value."""

_AT_RUN_TIME = "test_layout_rules_at_run_time.py"
ACCEPTED = {
    "sizes_are_set_in_the_layout": f"builds part of the model: {_AT_RUN_TIME}",
    "heads_share_query_groups": f"fails in the first step: {_AT_RUN_TIME}",
    "heads_fill_the_hidden_size": f"makes heads narrower without a word: {_AT_RUN_TIME}",
    "interleaved_stages_pair_messages": "wrong gradients between two stages: test_pipeline.py",
    "uneven_ends_have_stages": f"builds one of two ends: {_AT_RUN_TIME}",
    "stage_layout_has_stages": f"leaves stages out: {_AT_RUN_TIME}",
    "tied_weights_can_be_saved": f"fails in the first checkpoint: {_AT_RUN_TIME}",
    "expert_tensor_size_has_experts": f"splits nothing without a word: {_AT_RUN_TIME}",
    "router_has_enough_experts": f"fails in the first step: {_AT_RUN_TIME}",
    "experts_need_sequence_parallelism": "fails in the first step: "
    "test_layout_rules_against_megatron.py",
    "sequence_fits_the_model": f"fails in the first step: {_AT_RUN_TIME}",
    "experts_count_no_padding": f"counts padding as tokens: {_AT_RUN_TIME}",
    "full_attention_sees_no_others": "attends to padding: test_sequence_memory.py",
    "predicted_tokens_see_whole_sequences": "wrong gradients: verify/test_upstream.py",
    "packed_documents_drop_no_attention": f"fails in the first step: {_AT_RUN_TIME}",
    "whole_layers_are_recomputed": f"fails in the first step, or never ends it: {_AT_RUN_TIME}",
    "recomputed_mlps_have_no_bias": f"never ends the first step: {_AT_RUN_TIME}",
}
"""The rules of what Megatron-Core builds, with what comes of it and the tests that show it."""


def broken(case: Case) -> list[str]:
    """Return the names of the rules that a case breaks."""
    if list(world.numbers_are_positive(case)):
        return [world.numbers_are_positive.__name__]
    return [rule.__name__ for rule in RULES if list(rule(case))]


def test_check_refuses_what_megatron_refuses_or_gets_wrong_and_nothing_else():
    drawn: Counter[str] = Counter()

    def agree(case: Case) -> None:
        rules, refused = broken(case), refusal(case)
        drawn.update(rules or ["none"])
        if refused:
            assert rules, f"too lax: {refused}"
        else:
            assert set(rules) <= set(ACCEPTED), "too strict, or another that is taken at first"

    # A seed of its own for each: hypothesis would draw the same others beside each of them.
    few = settings(deadline=None, max_examples=EXAMPLES, database=None)
    for number, unusual in enumerate(UNUSUAL):
        seed(number)(few(given(cases(unusual))(agree)))()
    assert_drawn_well(drawn)


def assert_drawn_well(drawn: Counter[str]) -> None:
    """Hold that every rule was broken, and that a fair share of the cases broke none."""
    of_newer = (
        {"predicted_tokens_see_whole_sequences"} if megatron_core_is_before("0.17") else set()
    )
    names = {rule.__name__ for rule in chain(RULES, [world.numbers_are_positive])}
    assert names - set(drawn) == of_newer
    assert drawn["none"] > len(UNUSUAL) * EXAMPLES / 5


def test_what_is_accepted_is_a_rule():
    assert set(ACCEPTED) <= {rule.__name__ for rule in RULES}
