"""Known errors by the traces that they leave in the verdicts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence

from mcore_lab.config import Recipe
from mcore_lab.verify.compare import Verdict

_EXACT = 1e-3


def hints(verdicts: Sequence[Verdict], recipe: Recipe, world_size: int) -> list[str]:
    """Return which known errors would leave such traces; none if nothing is off."""
    off = [verdict for verdict in verdicts if not verdict.passed]
    return [hint for signature in _SIGNATURES if off for hint in signature(off, recipe, world_size)]


def _other_weights(off: Sequence[Verdict], recipe: Recipe, world_size: int) -> Iterator[str]:
    if any(verdict.kind == "initial weight" for verdict in off):
        yield (
            "the runs did not start from the same weights: each layout draws its own, so load a "
            "checkpoint (--checkpoint.load)"
        )


def _other_samples(off: Sequence[Verdict], recipe: Recipe, world_size: int) -> Iterator[str]:
    first = off[0]
    if first.kind == "activation" and first.name == "embedding":
        yield (
            "the first thing computed is off: other samples, or other tokens of them, went in; "
            "samples must be drawn by their global index, and sliced by the context-parallel group"
        )
    elif _of_later_micro_batch(first) and _replicas(recipe, world_size) > 1:
        yield (
            "the first micro-batch is right and others are not: replicas have other samples than "
            "theirs, which must be drawn by their global index"
        )


def _of_later_micro_batch(verdict: Verdict) -> bool:
    of_first_step = verdict.kind == "loss" and verdict.name.startswith("step 1,")
    return of_first_step and not verdict.name.endswith("micro-batch 1")


def _replicas(recipe: Recipe, world_size: int) -> int:
    layout = recipe.layout
    return world_size // (layout.tp * layout.cp * layout.pp)


def _exact_factor(off: Sequence[Verdict], recipe: Recipe, world_size: int) -> Iterator[str]:
    """Look for a gradient that is first off, and is so by a size of the layout."""
    first, layout = off[0], recipe.layout
    if first.kind != "gradient" or not first.ratio:
        return
    ratios = [verdict.ratio or 0.0 for verdict in off if verdict.kind == "gradient"]
    dp = _replicas(recipe, world_size)
    for name, size in {"cp": layout.cp, "tp": layout.tp, "dp": dp, "pp": layout.pp}.items():
        for factor, words in ((size, f"{size}"), (1 / size, f"1/{size}")):
            if size > 1 and math.isclose(first.ratio, factor, rel_tol=_EXACT):
                is_all = all(math.isclose(ratio, factor, rel_tol=_EXACT) for ratio in ratios)
                yield f"exactly {words} times the reference's gradient, and {name} is {size}: " + (
                    _TOO_OFTEN_IF_ALL.get(name, _TOO_OFTEN)
                    if factor > 1 and is_all
                    else _TOO_OFTEN
                    if factor > 1
                    else "a sum over ranks is missing"
                )


_TOO_OFTEN = (
    "it is summed over ranks once too often; an all-reduce whose backward all-reduces again "
    "multiplies what comes before it by the ranks"
)
_TOO_OFTEN_IF_ALL = {
    "cp": "a loss function that returns two values is scaled by the context-parallel size; return "
    "(loss_sum, num_tokens, report)",
    "dp": "gradients are summed over replicas where they should be averaged over tokens",
}


def _not_finalized(off: Sequence[Verdict], recipe: Recipe, world_size: int) -> Iterator[str]:
    ratios = [verdict.ratio for verdict in off if verdict.kind == "gradient" and verdict.ratio]
    tokens = recipe.data.global_batch_size * recipe.data.sequence_length
    share = tokens / (_replicas(recipe, world_size) * recipe.layout.cp)
    if ratios and share > 4 and share / 2 < min(ratios) and max(ratios) < 2 * tokens:
        yield (
            f"gradients are as many times too large as a rank has tokens ({share:.0f}): they are "
            "sums over tokens and over this rank's alone until finalize_model_grads, which needs "
            "config.finalize_model_grads_func"
        )


def _shared_parts(off: Sequence[Verdict], recipe: Recipe, world_size: int) -> Iterator[str]:
    names = [verdict.name for verdict in off if verdict.kind == "gradient"]
    replicated = ("layernorm", "layer_norm", "embedding", "router", "proj.bias", "fc2.bias")
    # Those of a layer that nobody knows by its name: ranks hold their gradients differently.
    torn = {verdict.name for verdict in off if verdict.kind == "copies"}
    if (
        names
        and off[0].kind in ("gradient", "copies")
        and all(
            f"gradient of {name}" in torn or any(part in name for part in replicated)
            for name in names
        )
    ):
        yield (
            "only weights that several ranks share are off: their gradients are partial sums until "
            "finalize_model_grads adds them up, which needs config.finalize_model_grads_func and, "
            "under sequence parallelism, the mark parameter.sequence_parallel"
        )


def _experts(off: Sequence[Verdict], recipe: Recipe, world_size: int) -> Iterator[str]:
    gradients = [verdict for verdict in off if verdict.kind in ("gradient", "copies")]
    if off[0] in gradients and all("experts." in verdict.name for verdict in gradients):
        yield (
            "only experts are off: their gradients are summed over expert-data-parallel ranks, and "
            "Megatron-Core 0.16 takes the others where etp is not tp and ep is 1 (Megatron-LM "
            "#5916)"
        )


def _upstream(off: Sequence[Verdict], recipe: Recipe, world_size: int) -> Iterator[str]:
    """Look for what Megatron-Core is known to do wrong where it is first off."""
    layout, first = recipe.layout, off[0]
    name = first.name if first.kind in ("gradient", "copies") else ""
    if layout.tp > 1 and "linear_kv_down_proj" in name:
        yield (
            "Megatron-Core leaves the gradient of the rotary keys, which all heads share, a part "
            "on each tensor-parallel rank (Megatron-LM #1699)"
        )
    if layout.cp > 1 and recipe.model.transformer.get("mtp_num_layers"):
        yield from _several_tokens(off)


def _several_tokens(off: Sequence[Verdict]) -> Iterator[str]:
    if any(verdict.kind == "gradient" and "mtp." in verdict.name for verdict in off):
        yield (
            "Megatron-Core 0.19 weighs the losses of multi-token prediction by the tokens of each "
            "context-parallel rank, of which the one with the end of the sequence has fewer "
            "(Megatron-LM #7498)"
        )
    elif {verdict.kind for verdict in off} == {"auxiliary loss"}:
        yield (
            "what is trained is right: Megatron-Core reports the mean of the means of "
            "context-parallel ranks, of which the one with the end of the sequence has fewer "
            "tokens (Megatron-LM #7498)"
        )


def _norm_alone(off: Sequence[Verdict], recipe: Recipe, world_size: int) -> Iterator[str]:
    kinds = {verdict.kind for verdict in off}
    if "grad norm" in kinds and not kinds & {"gradient", "activation", "loss", "copies"}:
        yield (
            "every gradient is right and their norm is not, so clipping is wrong: some are left "
            "out or counted twice (Megatron-Core 0.16 leaves out experts where etp is not tp, "
            "Megatron-LM #5916)"
        )


_GRADIENT_OF_LAYER = re.compile(r"gradient decoder\.layers\.(\d+)\.")


def _interleaved(off: Sequence[Verdict], recipe: Recipe, world_size: int) -> Iterator[str]:
    layers = {match[1] for verdict in off if (match := _GRADIENT_OF_LAYER.match(str(verdict)))}
    is_everywhere = len(layers) == recipe.model.num_layers
    if recipe.layout.vpp > 1 and is_everywhere and off[0].kind in ("gradient", "loss"):
        yield (
            "with interleaved stages, batch_p2p_comm=True between two ranks pairs sends with the "
            "wrong receives: overlap_p2p_comm=True, batch_p2p_comm=False"
        )


def _update(off: Sequence[Verdict], recipe: Recipe, world_size: int) -> Iterator[str]:
    first = off[0]
    if first.kind in ("moment", "weight") or (
        first.kind == "loss" and not first.name.startswith("step 1,")
    ):
        yield (
            "everything of the first step is right but what it made of the weights: the "
            "optimizer's step, or the gathering of what each rank of the distributed optimizer "
            "has updated"
        )


def _reported(off: Sequence[Verdict], recipe: Recipe, world_size: int) -> Iterator[str]:
    if off[0].name.startswith("step 1,") and {verdict.kind for verdict in off} == {"loss"}:
        yield (
            "only the reported loss is off: Megatron-Core divides the loss in place, so a report "
            "needs storage of its own"
        )


Signature = Callable[[Sequence[Verdict], Recipe, int], Iterator[str]]
_SIGNATURES: tuple[Signature, ...] = (
    _other_weights,
    _other_samples,
    _exact_factor,
    _not_finalized,
    _shared_parts,
    _experts,
    _upstream,
    _norm_alone,
    _interleaved,
    _update,
    _reported,
)
