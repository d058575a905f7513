"""Known errors by the traces that they leave in the verdicts."""

from __future__ import annotations

import math
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


def _whole_factor(off: Sequence[Verdict], recipe: Recipe, world_size: int) -> Iterator[str]:
    gradients = [verdict for verdict in off if verdict.kind == "gradient" and verdict.ratio]
    if not gradients or off[0].kind != "gradient":
        return
    ratios = [verdict.ratio for verdict in gradients if verdict.ratio]
    layout = recipe.layout
    dp = world_size // (layout.tp * layout.cp * layout.pp)
    sizes = {"cp": layout.cp, "tp": layout.tp, "dp": dp, "pp": layout.pp}
    everything = len({verdict.name for verdict in gradients}) > 1
    for name, size in sizes.items():
        for factor, words in ((size, f"{size}"), (1 / size, f"1/{size}")):
            if size > 1 and all(math.isclose(r, factor, rel_tol=_EXACT) for r in ratios):
                yield f"exactly {words} times the reference's gradient, and {name} is {size}: " + (
                    _OF_SIZE[name]
                    if everything
                    else "one gradient is reduced a time too many"
                    if factor > 1
                    else "one gradient is not reduced"
                )


_OF_SIZE = {
    "cp": "a loss function that returns two values is scaled by the context-parallel size; return "
    "(loss_sum, num_tokens, report)",
    "tp": "an all-reduce whose backward all-reduces again multiplies gradients by the ranks; one "
    "that is missing leaves a part",
    "dp": "gradients are summed over replicas where they should be averaged over tokens, or the "
    "reverse",
    "pp": "gradients are counted once a stage",
}


def _shared_parts(off: Sequence[Verdict], recipe: Recipe, world_size: int) -> Iterator[str]:
    names = [verdict.name for verdict in off if verdict.kind == "gradient"]
    replicated = ("layernorm", "embedding", "router", "layer_norm", "bias")
    if (
        names
        and off[0].kind in ("gradient", "copies")
        and all(any(part in name for part in replicated) for name in names)
    ):
        yield (
            "only weights that several ranks share are off: their gradients are partial sums until "
            "finalize_model_grads adds them up, which needs config.finalize_model_grads_func and, "
            "under sequence parallelism, the mark parameter.sequence_parallel"
        )


def _experts(off: Sequence[Verdict], recipe: Recipe, world_size: int) -> Iterator[str]:
    gradients = [verdict for verdict in off if verdict.kind == "gradient"]
    if gradients and all("experts." in verdict.name for verdict in gradients):
        yield (
            "only experts are off: their gradients are summed over expert-data-parallel ranks, and "
            "Megatron-Core 0.16 takes the others where etp is not tp"
        )


def _norm_alone(off: Sequence[Verdict], recipe: Recipe, world_size: int) -> Iterator[str]:
    kinds = {verdict.kind for verdict in off}
    if "grad norm" in kinds and not kinds & {"gradient", "activation", "loss", "copies"}:
        yield (
            "every gradient is right and their norm is not, so clipping is wrong: some are left "
            "out or counted twice (Megatron-Core 0.16 leaves out experts where etp is not tp)"
        )


def _interleaved(off: Sequence[Verdict], recipe: Recipe, world_size: int) -> Iterator[str]:
    if recipe.layout.vpp > 1 and off[0].kind in ("gradient", "activation", "loss"):
        yield (
            "with interleaved stages, batch_p2p_comm=True between two ranks pairs sends with the "
            "wrong receives: overlap_p2p_comm=True, batch_p2p_comm=False"
        )


def _reported(off: Sequence[Verdict], recipe: Recipe, world_size: int) -> Iterator[str]:
    if {verdict.kind for verdict in off} == {"loss"}:
        yield (
            "only the reported loss is off: Megatron-Core divides the loss in place, so a report "
            "needs storage of its own"
        )


Signature = Callable[[Sequence[Verdict], Recipe, int], Iterator[str]]
_SIGNATURES: tuple[Signature, ...] = (
    _other_weights,
    _other_samples,
    _whole_factor,
    _shared_parts,
    _experts,
    _norm_alone,
    _interleaved,
    _reported,
)
