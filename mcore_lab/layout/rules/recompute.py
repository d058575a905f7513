"""Rules of activation recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mcore_lab.compat import megatron_core_is_before
from mcore_lab.layout.rules import pipeline
from mcore_lab.layout.rules.case import Case, Rule
from mcore_lab.layout.rules.report import BrokenRule, other_amounts

_GRANULARITIES = ("full", "selective")
_METHODS = ("uniform", "block")
_MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")
_LAYERS = "recompute_num_layers"
_DIVIDING = (
    pipeline.layers_are_divided_in_one_way,
    pipeline.uneven_ends_have_stages,
    pipeline.layers_divide,
    pipeline.stage_layout_has_stages,
    pipeline.stage_layout_fits,
)
"""The rules that must hold before the layers of a stage can be counted."""


def recomputation_is_described(case: Case) -> Iterator[BrokenRule]:
    """Whole layers are recomputed by a method and a number of them; modules by their names.

    Source: `TransformerConfig.__post_init__`, 0.16.1 to 0.19.
    """
    granularity, method = case.of_model("recompute_granularity"), case.of_model("recompute_method")
    layers = case.of_model(_LAYERS)
    if granularity is None:
        return
    if granularity not in _GRANULARITIES:
        yield _unknown("recompute_granularity", granularity, _GRANULARITIES)
    if method is not None and method not in _METHODS:
        yield _unknown("recompute_method", method, _METHODS)
    if granularity == "full" and (method is None or layers is None):
        missing = ["--model.transformer.recompute_method uniform or block"] * (method is None)
        missing += [f"--model.transformer.{_LAYERS} 1"] * (layers is None)
        yield BrokenRule(
            rule=f"recompute_granularity full needs recompute_method and {_LAYERS}",
            numbers=f"recompute_method {method}, {_LAYERS} {layers}",
            fix=" and ".join(missing),
        )
    if granularity == "selective" and layers is not None:
        yield BrokenRule(
            rule=f"recompute_granularity selective takes no {_LAYERS}",
            numbers=f"{_LAYERS} {layers}",
            fix=f"a model without {_LAYERS}, or --model.transformer.recompute_granularity full",
        )


def whole_layers_are_recomputed(case: Case) -> Iterator[BrokenRule]:
    """Uniform recomputation goes through a stage in steps of some layers, up to its end.

    In steps of none it would never end. Before 0.19 a last step that is shorter fails; layers that
    predict further tokens are recomputed one at a time.
    Source: `_checkpointed_forward` of megatron/core/transformer/transformer_block.py.
    """
    layers = case.model_amount(_LAYERS, default=1)
    full = case.of_model("recompute_granularity") == "full"
    if not full or case.of_model("recompute_method") != "uniform":
        return
    predicted = bool(case.of_model("mtp_num_layers"))
    if any(list(rule(case)) for rule in _DIVIDING):
        return
    counts = sorted(set(pipeline.layer_counts(case)))

    def steps_fit(n: int) -> bool:
        return (n == 1 or not predicted) and (
            not megatron_core_is_before("0.19") or all(count % n == 0 for count in counts)
        )

    if layers.value >= 1 and steps_fit(layers.value):
        return
    stages = " or ".join(map(str, counts))
    one = ", and be 1 with mtp_num_layers" if predicted else ""
    yield BrokenRule(
        rule=f"{_LAYERS} of uniform recomputation must divide the layers of each stage{one}",
        numbers=f"{_LAYERS} {layers.value}, layers of a stage {stages}",
        fix=other_amounts(layers, steps_fit, most=max(1, *counts)),
    )


def recomputed_modules_are_there(case: Case) -> Iterator[BrokenRule]:
    """What is recomputed selectively has a name, and the model is built so that it can be."""
    if case.of_model("recompute_granularity") != "selective":
        return
    modules = case.of_model("recompute_modules") or ()
    known = (*_MODULES, *(() if megatron_core_is_before("0.17") else ("gdn_norm_out",)))
    for name in modules:
        if name not in known:
            yield _unknown("recompute_modules", name, known)
    needs: dict[str, tuple[str, Any]] = {
        "moe_act": ("moe_grouped_gemm", True),
        "mla_up_proj": ("multi_latent_attention", True),
    }
    if case.of_model("moe_shared_expert_intermediate_size"):
        needs["shared_experts"] = ("moe_shared_expert_overlap", False)
    for name, (field, value) in needs.items():
        if name in modules and case.of_model(field, False) != value:
            yield BrokenRule(
                rule=f"{name} can be recomputed only with {field} {value}",
                numbers=f"recompute_modules {', '.join(modules)}, {field} {not value}",
                fix=f"--model.transformer.{field} {value}, or recompute_modules without {name}",
            )


def saved_activations_are_split_once(case: Case) -> Iterator[BrokenRule]:
    """Sequence parallelism has split already what `distribute_saved_activations` would split."""
    recomputed = case.of_model("recompute_granularity") is not None
    if recomputed and case.layout.sp and case.of_model("distribute_saved_activations"):
        yield BrokenRule(
            rule="distribute_saved_activations is not for sequence_parallel",
            numbers="distribute_saved_activations True, sequence_parallel True",
            fix="--model.transformer.distribute_saved_activations False, or --layout.sp False",
        )


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


def _unknown(name: str, value: object, known: tuple[str, ...]) -> BrokenRule:
    return BrokenRule(
        rule=f"{name} must be of {', '.join(known)}",
        numbers=f"{name} {value}",
        fix=f"--model.transformer.{name} {' or '.join(known)}",
    )


RULES: tuple[Rule, ...] = (
    recomputation_is_described,
    whole_layers_are_recomputed,
    recomputed_modules_are_there,
    saved_activations_are_split_once,
    recomputed_mlps_have_no_bias,
)
