"""What keeps two layouts of a recipe from being compared. No torch in here: said before any run."""

from __future__ import annotations

from collections.abc import Iterator

from mcore_lab.config import Recipe
from mcore_lab.errors import ConfigError

_DROPOUT = 0.1
"""`TransformerConfig`'s default, of both kinds."""


def require_comparable(recipe: Recipe) -> None:
    """Raise ConfigError with all that depends on the layout by its definition, one a line."""
    obstacles = list(_obstacles(recipe))
    if obstacles:
        raise ConfigError("\n".join(obstacles))


def _obstacles(recipe: Recipe) -> Iterator[str]:
    fields = recipe.model.transformer
    for name in ("hidden_dropout", "attention_dropout"):
        if fields.get(name, _DROPOUT):
            yield (
                f"layouts draw dropout differently, so no two can be compared with it: "
                f"--model.transformer.{_dashed(name)} 0"
            )
    if fields.get("moe_input_jitter_eps"):
        yield (
            "layouts draw the jitter of the router's input differently: "
            "--model.transformer.moe-input-jitter-eps None"
        )
    if fields.get("moe_expert_capacity_factor"):
        yield (
            "which tokens an expert drops depends on which ranks share its capacity: "
            "--model.transformer.moe-expert-capacity-factor None"
        )
    if recipe.model.num_moe_experts:
        yield from _balance(recipe)


def _balance(recipe: Recipe) -> Iterator[str]:
    fields = recipe.model.transformer
    kinds = fields.get("moe_router_load_balancing_type", "aux_loss")
    coefficients = fields.get("moe_aux_loss_coeff", 0.0)
    pairs = (
        zip(kinds, coefficients, strict=False)
        if isinstance(kinds, (list, tuple)) and isinstance(coefficients, (list, tuple))
        else [(kinds, coefficients)]
    )
    for kind, coefficient in pairs:
        if kind == "aux_loss" and coefficient:
            yield (
                "the auxiliary loss aux_loss is a mean over the tokens of each micro-batch and "
                "replica, so it depends on the layout: "
                "--model.transformer.moe-router-load-balancing-type seq_aux_loss (by sequence), or "
                "--model.transformer.moe-aux-loss-coeff 0"
            )
        if kind == "global_aux_loss" and coefficient:
            yield (
                "the auxiliary loss global_aux_loss counts the tokens of all micro-batches so far, "
                "of which replicas take several at a time, so it depends on the layout: "
                "--model.transformer.moe-router-load-balancing-type seq_aux_loss (by sequence), or "
                "--model.transformer.moe-aux-loss-coeff 0"
            )
        if kind == "sinkhorn":
            yield (
                "sinkhorn routing weighs a token against all others that its rank has, so it "
                "depends on how a layout splits them: "
                "--model.transformer.moe-router-load-balancing-type none"
            )
    if fields.get("moe_router_enable_expert_bias"):
        yield (
            "the experts' bias follows counts of tokens, in steps of a fixed size: a tie that "
            "rounding decides moves it: --model.transformer.moe-router-enable-expert-bias False"
        )


def _dashed(name: str) -> str:
    return name.replace("_", "-")
