"""The rules that a layout must keep for a model, its data and a number of ranks.

They are what Megatron-Core refuses (0.16.1 to 0.19), from the start of the process groups to the
first step, and what it gets wrong without a word. All are judged without torch, before any process
exists.
"""

from __future__ import annotations

from mcore_lab.layout.rules import data, experts, pipeline, recompute, tensor, world
from mcore_lab.layout.rules.case import Case, Rule
from mcore_lab.layout.rules.report import BrokenRule

RULES: tuple[Rule, ...] = (
    *world.RULES,
    *tensor.RULES,
    *pipeline.RULES,
    *experts.RULES,
    *data.RULES,
    *recompute.RULES,
)
"""Each yields what it finds broken. Their order is that of the report."""


def broken_rules(case: Case) -> list[BrokenRule]:
    """Return all that `case` breaks; if a number is below 1, only that."""
    below_one = list(world.numbers_are_positive(case))
    return below_one or [broken for rule in RULES for broken in rule(case)]
