"""The rules of a layout: each breaks alone, says its numbers, and offers values that work."""

from __future__ import annotations

import re
import subprocess
import sys
from ast import literal_eval
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_cases import WRONG, Data, Model, Wrong, layout_of

from mcore_lab.compat import megatron_core_is_before
from mcore_lab.errors import LayoutError
from mcore_lab.layout import SHORT_NAMES, BrokenRule
from mcore_lab.layout.rules import RULES, broken_rules
from mcore_lab.layout.rules.case import Case
from mcore_lab.layout.rules.report import nearest_values

FOLDED = " (ep and etp fold into the world, they do not multiply it)"
OFFER = re.compile(
    r"--(layout|model\.transformer|model|data)\.([\w-]+) (\d+|True|False)(?: or (\d+))?"
)
OFFERED_ORDER = re.compile(r"--layout\.order ([\w-]+)")
OFFERED_WORLD = re.compile(r"(\d+)(?= or \d+ ranks?| ranks?)")

every_wrong = pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())


@every_wrong
def test_a_broken_rule_is_reported_alone_with_its_numbers_and_the_nearest_values(wrong: Wrong):
    assert [str(broken) for broken in broken_rules(wrong.case)] == [wrong.says]


@every_wrong
def test_the_mended_layout_passes(wrong: Wrong):
    assert broken_rules(wrong.mend().case) == []


def test_every_rule_has_an_example_that_breaks_it():
    cases = [w.case for w in WRONG.values() if " at least 1" not in w.says]
    unbroken = [rule.__name__ for rule in RULES if not any(list(rule(case)) for case in cases)]
    of_newer = ["predicted_tokens_see_whole_sequences"]
    assert unbroken == (of_newer if megatron_core_is_before("0.17") else [])


def test_all_broken_rules_are_reported_at_once():
    broken = layout_of(tp=3, pp=2, ep=2).check(
        Model(num_layers=5, vocab_size=100),
        Data(sequence_length=60, global_batch_size=30),
        world_size=4,
    )
    assert [rule.rule for rule in broken] == [
        "world size must be a multiple of tp * cp * pp" + FOLDED,
        "world size must be a multiple of etp * ep * pp" + FOLDED,
        "num_attention_heads must be a multiple of tp",
        "ffn_hidden_size must be a multiple of tp",
        "vocab_size must be a multiple of tp",
        "num_layers must be a multiple of pp",
        "ep above 1 needs num_moe_experts",
    ]


def test_a_layout_is_refused_with_one_line_for_each_broken_rule():
    layout, model, data = layout_of(tp=3), Model(vocab_size=100), Data()
    with pytest.raises(LayoutError) as refused:
        layout.require(model, data, 2)
    assert str(refused.value).splitlines() == [str(rule) for rule in layout.check(model, data, 2)]
    assert len(str(refused.value).splitlines()) == 4
    layout_of(tp=2).require(model, data, 2)


def test_a_size_below_one_hides_only_what_cannot_be_computed_without_it():
    broken = layout_of(tp=0, pp=-1).check(Model(num_attention_heads=0), Data(), world_size=3)
    assert [rule.rule.removesuffix(" must be at least 1") for rule in broken] == [
        "tp",
        "pp",
        "num_attention_heads",
    ]


@pytest.mark.parametrize(
    ("pp", "given"),
    [
        (2, {"batch_p2p_comm": True}),
        (2, {"overlap_p2p_comm": False}),
        (2, {"overlap_p2p_comm": False, "batch_p2p_comm": True}),
        (4, {"batch_p2p_comm": True}),
    ],
)
def test_messages_that_interleaving_would_mismatch_are_refused(pp: int, given: dict[str, bool]):
    broken = layout_of(pp=pp, vpp=2).check(
        Model(num_layers=8, transformer=given), Data(), world_size=pp
    )
    assert [rule.rule for rule in broken] == [
        "interleaved stages need overlap_p2p_comm True and batch_p2p_comm False"
    ]


def test_interleaving_of_more_than_two_stages_may_batch_its_messages():
    batched = Model(num_layers=8, transformer={"overlap_p2p_comm": False, "batch_p2p_comm": True})
    assert layout_of(pp=4, vpp=2).check(batched, Data(), world_size=4) == []


@pytest.mark.parametrize("frequency", [1, [1, 1, 1, 1]])
def test_a_model_of_experts_only_has_no_dense_width_to_split(frequency: Any):
    fields = {"moe_layer_freq": frequency, "moe_ffn_hidden_size": 16, "add_bias_linear": False}
    model = Model(ffn_hidden_size=15, num_moe_experts=4, transformer=fields)
    layout = layout_of(tp=2, sp=True)
    assert layout.check(model, Data(), world_size=2) == []
    some_dense = replace(model, transformer={**fields, "moe_layer_freq": [0, 1, 1, 1]})
    assert [rule.rule for rule in layout.check(some_dense, Data(), world_size=2)] == [
        "ffn_hidden_size must be a multiple of tp"
    ]


def test_checking_imports_neither_torch_nor_numpy():
    program = (
        "import sys; from types import SimpleNamespace;"
        "from mcore_lab.layout import ParallelLayout;"
        "model = SimpleNamespace(num_layers=5, hidden_size=64, num_attention_heads=4,"
        " num_query_groups=None, ffn_hidden_size=None, num_moe_experts=None, vocab_size=100,"
        " max_sequence_length=None, transformer={});"
        "data = SimpleNamespace(sequence_length=64, micro_batch_size=4, global_batch_size=8,"
        " pack_documents=False);"
        "layout = ParallelLayout(tensor_model_parallel_size=3, order='pp-dp-ep-cp-tp');"
        "print(len(layout.check(model, data, 2)), {'torch', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("4 set()\n", "")


# What is offered as a repair.


def offered(broken: BrokenRule, case: Case) -> Iterator[Case]:
    """Yield the case with each value that the report offers, one at a time."""
    for where, name, *values in OFFER.findall(broken.fix):
        for value in filter(None, values):
            yield changed(case, where, name.replace("-", "_"), literal_eval(value))
    for order in OFFERED_ORDER.findall(broken.fix):
        yield changed(case, "layout", "order", order)
    for world_size in OFFERED_WORLD.findall(broken.fix):
        yield replace(case, world_size=int(world_size))


def changed(case: Case, where: str, name: str, value: Any) -> Case:
    if where == "layout":
        return replace(case, layout=replace(case.layout, **{SHORT_NAMES.get(name, name): value}))
    if where == "data":
        return replace(case, data=replace(case.data, **{name: value}))
    if where == "model.transformer":
        fields = {**case.model.transformer, name: value}
        return replace(case, model=replace(case.model, transformer=fields))
    return replace(case, model=replace(case.model, **{name: value}))


def assert_offers_work(case: Case) -> None:
    for rule in RULES:
        broken = list(rule(case))
        for one in broken:
            assert one.fix
            for repaired in offered(one, case):
                assert len(list(rule(repaired))) < len(broken), (str(one), repaired)


@every_wrong
def test_every_value_that_is_offered_keeps_the_rule(wrong: Wrong):
    if " at least 1" not in wrong.says:
        assert_offers_work(wrong.case)


small = st.integers(1, 6)
maybe = st.none() | small
wrongs = st.builds(
    Wrong,
    layout=st.fixed_dictionaries(
        {"tp": small, "pp": small, "cp": small, "ep": small, "sp": st.booleans()},
        optional={
            "etp": small,
            "vpp": small,
            "order": st.permutations(["tp", "cp", "ep", "dp", "pp"]).map("-".join),
        },
    ),
    model=st.fixed_dictionaries(
        {"num_layers": st.integers(1, 24), "num_attention_heads": st.integers(1, 24)},
        optional={
            "hidden_size": st.integers(1, 96),
            "num_query_groups": small,
            "ffn_hidden_size": st.integers(1, 99),
            "num_moe_experts": small,
            "vocab_size": st.integers(1, 99),
            "max_sequence_length": st.integers(1, 99),
            "transformer": st.fixed_dictionaries(
                {},
                optional={
                    "add_bias_linear": st.booleans(),
                    "kv_channels": small,
                    "moe_ffn_hidden_size": small,
                    "moe_router_topk": small,
                    "moe_shared_expert_intermediate_size": small,
                    "num_layers_in_first_pipeline_stage": small,
                    "num_layers_in_last_pipeline_stage": small,
                    "account_for_embedding_in_pipeline_split": st.booleans(),
                    "pipeline_model_parallel_layout": st.just("Et|(t|)*2,t*3L"),
                    "microbatch_group_size_per_vp_stage": small,
                    "overlap_p2p_comm": st.booleans(),
                    "batch_p2p_comm": st.booleans(),
                },
            ),
        },
    ),
    data=st.fixed_dictionaries(
        {},
        optional={
            "sequence_length": st.integers(1, 99),
            "micro_batch_size": small,
            "global_batch_size": st.integers(1, 99),
        },
    ),
    world=st.integers(1, 32),
)


@given(wrongs)
@settings(deadline=None)
def test_every_value_that_is_ever_offered_keeps_the_rule(wrong: Wrong):
    assert_offers_work(wrong.case)


@given(value=st.integers(0, 60), unit=st.integers(1, 30), most=st.integers(1, 60))
def test_nearest_values_are_the_closest_on_either_side(value: int, unit: int, most: int):
    multiples = [n for n in range(1, most + 1) if n % unit == 0]
    below, above = [n for n in multiples if n < value], [n for n in multiples if n > value]
    assert nearest_values(value, lambda n: n % unit == 0, most) == below[-1:] + above[:1]
