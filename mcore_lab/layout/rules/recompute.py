"""Rules of activation recomputation."""

from __future__ import annotations

from collections.abc import Iterator

from mcore_lab.layout.rules.case import Case, Rule
from mcore_lab.layout.rules.report import BrokenRule


def recomputed_mlps_have_no_bias(case: Case) -> Iterator[BrokenRule]:
    """A recomputed MLP must return no bias: its backward pass would never end.

    `MLP.forward` hands its last bias on to be added later. `tensor_parallel.checkpoint` makes that
    parameter a result of its own node, so that the recomputed graph leads to the node again.
    Source: `_forward_mlp` of megatron/core/transformer/transformer_layer.py, 0.16.1 to 0.19.
    """
    modules = case.of_model("recompute_modules") or ()
    recomputed = case.of_model("recompute_granularity") == "selective" and "mlp" in modules
    if recomputed and case.of_model("add_bias_linear", True):
        yield BrokenRule(
            rule="a recomputed mlp must have no bias, or its backward pass never ends",
            numbers=f"recompute_modules {', '.join(modules)}, add_bias_linear True",
            fix="--model.transformer.add_bias_linear False, or recompute_modules without mlp",
        )


RULES: tuple[Rule, ...] = (recomputed_mlps_have_no_bias,)
