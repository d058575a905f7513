"""Rules of the pipeline: how layers fall into stages, and how stages talk to each other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mcore_lab.layout.rules.case import Case, Rule
from mcore_lab.layout.rules.report import (
    BrokenRule,
    either,
    other_amounts,
    other_sizes,
)

if TYPE_CHECKING:
    from mcore_lab.layout.parallel import ParallelLayout

_FIRST = "num_layers_in_first_pipeline_stage"
_LAST = "num_layers_in_last_pipeline_stage"
_EMBEDDING = "account_for_embedding_in_pipeline_split"
_LOSS = "account_for_loss_in_pipeline_split"
_STAGES = "pipeline_model_parallel_layout"


def interleaving_has_stages(case: Case) -> Iterator[BrokenRule]:
    """Chunks are interleaved over pipeline stages: `initialize_model_parallel` refuses one."""
    layout = case.layout
    if layout.vpp > 1 and layout.pp == 1:
        yield BrokenRule(
            rule="vpp above 1 needs pp above 1",
            numbers=f"vpp {layout.vpp}, pp 1",
            fix="--layout.vpp 1, or --layout.pp 2",
        )


def interleaved_stages_pair_messages(case: Case) -> Iterator[BrokenRule]:
    """Interleaved stages do not batch sends and receives to one and the same rank.

    Between two stages that pairs them wrongly, and gradients are wrong without an error.
    Source: Megatron-LM's `validate_args` and the check in the interleaved schedule.
    """
    layout = case.layout
    if layout.vpp == 1 or layout.pp == 1:
        return
    overlap, batch = case.of_model("overlap_p2p_comm", True), case.of_model("batch_p2p_comm", False)
    if (overlap and batch) or (layout.pp == 2 and not overlap):
        yield BrokenRule(
            rule="interleaved stages need overlap_p2p_comm True and batch_p2p_comm False",
            numbers=f"pp {layout.pp}, vpp {layout.vpp}, overlap_p2p_comm {overlap}, "
            f"batch_p2p_comm {batch}",
            fix="neither in model.transformer: the layout sets both",
        )


def plain_stages_do_not_overlap(case: Case) -> Iterator[BrokenRule]:
    """The schedule without interleaving refuses to overlap its messages."""
    layout = case.layout
    if layout.pp > 1 and layout.vpp == 1 and case.of_model("overlap_p2p_comm"):
        yield BrokenRule(
            rule="overlap_p2p_comm needs vpp above 1",
            numbers=f"pp {layout.pp}, vpp 1",
            fix="--layout.vpp 2, or --model.transformer.overlap_p2p_comm False",
        )


def layers_are_divided_in_one_way(case: Case) -> Iterator[BrokenRule]:
    """Uneven ends, counting embedding and loss as layers, and a stage layout exclude each other."""
    ways = ((_FIRST, _LAST), (_EMBEDDING, _LOSS), (_STAGES,))
    used = [[name for name in way if case.of_model(name)] for way in ways]
    names = [name for way in used for name in way]
    if sum(map(bool, used)) > 1:
        yield BrokenRule(
            rule="layers must be divided over stages in one way",
            numbers=f"{' and '.join(names)} are set",
            fix="only one of them",
        )


def uneven_ends_have_stages(case: Case) -> Iterator[BrokenRule]:
    """There is a stage for each uneven end: of the two of one stage Megatron-Core builds one."""
    pp, ends = case.layout.pp, _uneven_ends(case)
    if len(ends) > pp and not case.of_model(_STAGES):
        yield BrokenRule(
            rule=f"{_FIRST} and {_LAST} need pp above 1",
            numbers=f"{ends[0]} and {ends[1]} layers, pp {pp}",
            fix="--layout.pp 2, or neither of them",
        )


def layers_divide(case: Case) -> Iterator[BrokenRule]:
    """Every model chunk gets the number of layers that Megatron-Core will build."""
    layout, layers = case.layout, case.model_amount("num_layers")
    if case.of_model(_STAGES) or any(uneven_ends_have_stages(case)):
        return
    if _layers_fit(case, layers.value, layout):
        return
    most = layers.value + 8 * layout.pp * layout.vpp
    yield BrokenRule(
        rule=_layers_rule(case),
        numbers=_layers_numbers(case),
        fix=either(
            *other_sizes(
                layout, ("pp", "vpp"), lambda other: _layers_fit(case, layers.value, other)
            ),
            other_amounts(layers, lambda n: _layers_fit(case, n, layout), most),
        )
        or "no uneven ends",
    )


def stage_layout_has_stages(case: Case) -> Iterator[BrokenRule]:
    """A written-out stage layout has a stage for each chunk.

    With another number of chunks, Megatron-Core would leave some out without a word.
    """
    layout, stages = case.layout, _written_stages(case)
    if stages and len(stages) != layout.pp * layout.vpp:
        yield BrokenRule(
            rule=f"{_STAGES} must have pp * vpp stages",
            numbers=f"{len(stages)} stages, pp * vpp = {layout.pp} * {layout.vpp}",
            fix=either(
                *other_sizes(layout, ("pp", "vpp"), lambda o: o.pp * o.vpp == len(stages)),
                f"{layout.pp * layout.vpp} stages",
            ),
        )


def stage_layout_fits(case: Case) -> Iterator[BrokenRule]:
    """A written-out stage layout has all the layers, each where Megatron-Core can have it.

    Source: `PipelineParallelLayerLayout.validate_layer_layout`, 0.16.1 to 0.19.
    """
    stages = _written_stages(case)
    if not stages:
        return
    decoders = sum(map(decoder_layers, stages))
    if decoders != case.model.num_layers:
        yield BrokenRule(
            rule=f"{_STAGES} must have num_layers decoder layers",
            numbers=f"{decoders} of them, num_layers {case.model.num_layers}",
            fix=f"--model.num-layers {decoders}, or {case.model.num_layers} of them",
        )
    yield from _ends_of_stage_layout_fit(stages)
    yield from _predictions_of_stage_layout_fit(case, stages)


def _ends_of_stage_layout_fit(stages: Sequence[Sequence[Any]]) -> Iterator[BrokenRule]:
    kinds = [kind for stage in stages for kind in layer_kinds(stage)] or ["nothing"]
    embeddings, losses = kinds.count("embedding"), kinds.count("loss")
    if (kinds[0], kinds[-1], embeddings, losses) != ("embedding", "loss", 1, 1):
        yield BrokenRule(
            rule=f"{_STAGES} must begin with its one embedding and end with its one loss",
            numbers=f"embedding {embeddings} times, loss {losses} times, "
            f"{kinds[0]} first and {kinds[-1]} last",
            fix="E first and L last",
        )


def _predictions_of_stage_layout_fit(
    case: Case, stages: Sequence[Sequence[Any]]
) -> Iterator[BrokenRule]:
    wanted, layout = case.of_model("mtp_num_layers", 0), case.layout
    written = [layer_kinds(stage).count("mtp") for stage in stages]
    if sum(written) != wanted:
        yield BrokenRule(
            rule=f"{_STAGES} must have mtp_num_layers layers of multi-token prediction",
            numbers=f"{sum(written)} of them, mtp_num_layers {wanted}",
            fix=f"--model.transformer.mtp_num_layers {sum(written)}, or {wanted} of them"
            if sum(written)
            else f"{wanted} of them",
        )
        return
    # What comes after the last decoder layer, and is not before any rank's last chunk.
    decoders = [place for place, stage in enumerate(stages) if decoder_layers(stage)]
    earliest = max([layout.pp * (layout.vpp - 1), *decoders])
    places = [place for place, count in enumerate(written) if count]
    torn = any("decoder" in _after_the_first(stage, "mtp") for stage in map(layer_kinds, stages))
    if wanted and (len(places) > 1 or places[0] < earliest or torn):
        yield BrokenRule(
            rule=f"{_STAGES} must have all mtp layers in one stage, the last chunk of its rank, "
            "and after all decoder layers",
            numbers=f"in stages {', '.join(map(str, places))} of {len(stages)}",
            fix=f"{'m' * wanted}L in the last stage",
        )


def _after_the_first(kinds: list[str], kind: str) -> list[str]:
    return kinds[kinds.index(kind) :] if kind in kinds else []


def tied_weights_can_be_saved(case: Case) -> Iterator[BrokenRule]:
    """A model that predicts several tokens is not tied across stages: it could not be saved.

    The last stage has an embedding of its own then, and its output layer a weight that
    `LanguageModule.sharded_state_dict` does not expect.
    """
    tied = case.of_model("share_embeddings_and_output_weights")
    if tied and case.of_model("mtp_num_layers") and case.layout.pp > 1:
        yield BrokenRule(
            rule="with mtp_num_layers and pp above 1 the output layer needs a weight of its own",
            numbers=f"mtp_num_layers {case.of_model('mtp_num_layers')}, pp {case.layout.pp}, "
            "share_embeddings_and_output_weights True",
            fix="--model.share-embeddings-and-output-weights False, or --layout.pp 1",
        )


def _written_stages(case: Case) -> list[Sequence[Any]]:
    written = case.of_model(_STAGES)
    return stages_of(written) if isinstance(written, (str, list, tuple)) else []


def _layers_fit(case: Case, layers: int, layout: ParallelLayout) -> bool:
    ends = _uneven_ends(case)
    if not ends:
        return (layers + _counted_as_layers(case)) % (layout.pp * layout.vpp) == 0
    stages, left = layout.pp - len(ends), layers - sum(ends)
    if any(end < 1 or end % layout.vpp for end in ends) or stages < 0:
        return False
    if stages == 0:
        # Interleaving divides by the number of stages in between.
        return left == 0 and layout.vpp == 1
    return left > 0 and left % (stages * layout.vpp) == 0


def _layers_rule(case: Case) -> str:
    chunks = "pp * vpp" if case.layout.vpp > 1 else "pp"
    if _uneven_ends(case):
        if case.layout.vpp > 1:
            return "interleaved uneven ends need stages in between, and vpp must divide all evenly"
        return "the stages between the uneven ends must share the other layers evenly"
    counted = " + those counted as layers" if _counted_as_layers(case) else ""
    return f"num_layers{counted} must be a multiple of {chunks}"


def _layers_numbers(case: Case) -> str:
    layers = f"num_layers {case.model.num_layers}"
    sizes = f"pp {case.layout.pp}, vpp {case.layout.vpp}"
    given = [f"{name} {value}" for name in _SPLIT_FIELDS if (value := case.of_model(name, ""))]
    return ", ".join([layers, *given, sizes])


def _uneven_ends(case: Case) -> list[int]:
    ends = (case.of_model(_FIRST), case.of_model(_LAST))
    return [end for end in ends if end is not None]


def _counted_as_layers(case: Case) -> int:
    return bool(case.of_model(_EMBEDDING)) + bool(case.of_model(_LOSS))


_SPLIT_FIELDS = (_FIRST, _LAST, _EMBEDDING, _LOSS)
_REPEAT = re.compile(r"(?:\(([^()]*)\)|([^()]))\*(\d+)")


def stages_of(written: str | Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """Return the stages of Megatron-Core's notation: `Et|(tt|)*2L` is Et, tt, tt, L."""
    if not isinstance(written, str):
        return list(written)
    text, repeats = written.replace(",", ""), 1
    while repeats:
        text, repeats = _REPEAT.subn(lambda m: (m[2] or m[1]) * int(m[3]), text)
    return list(text.split("|"))


_LETTERS = {"E": "embedding", "t": "decoder", "m": "mtp", "L": "loss"}


def layer_kinds(stage: Sequence[Any]) -> list[str]:
    """Return what a stage is made of, in Megatron-Core's names of its `LayerType`."""
    if isinstance(stage, str):
        return [_LETTERS.get(letter, letter) for letter in stage]
    return [str(getattr(layer, "name", layer)).strip().lower() for layer in stage]


def decoder_layers(stage: Sequence[Any]) -> int:
    """Return the decoder layers of a stage that is written out."""
    return layer_kinds(stage).count("decoder")


def layer_counts(case: Case) -> list[int]:
    """Return the layers of each stage, as `get_num_layers_to_build` counts them.

    In the order in which a micro-batch goes through the stages; the layers must divide.
    Source: megatron/core/transformer/transformer_block.py, 0.16.1 to 0.19.
    """
    pp, vpp = case.layout.pp, case.layout.vpp
    written = case.of_model(_STAGES)
    if written:
        return [decoder_layers(stage) for stage in stages_of(written)]
    first, last = case.of_model(_FIRST), case.of_model(_LAST)
    embedding, loss = bool(case.of_model(_EMBEDDING)), bool(case.of_model(_LOSS))
    between = pp - (first is not None) - (last is not None)
    rest = case.model.num_layers - (first or 0) - (last or 0) + embedding + loss
    even = rest // between if between else 0
    ranks = [even] * pp
    if first is not None:
        ranks[0] = first
    if last is not None:
        ranks[-1] = last
    counts = [layers // vpp for layers in ranks] * vpp
    counts[0] -= embedding
    counts[-1] -= loss
    return counts


RULES: tuple[Rule, ...] = (
    interleaving_has_stages,
    interleaved_stages_pair_messages,
    plain_stages_do_not_overlap,
    layers_are_divided_in_one_way,
    uneven_ends_have_stages,
    layers_divide,
    stage_layout_has_stages,
    stage_layout_fits,
    tied_weights_can_be_saved,
)
