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


def layers_divide(case: Case) -> Iterator[BrokenRule]:
    """Every model chunk gets the number of layers that Megatron-Core will build."""
    layout, layers = case.layout, case.model_amount("num_layers")
    if case.of_model(_STAGES) or _layers_fit(case, layers.value, layout):
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


def stage_layout_fits(case: Case) -> Iterator[BrokenRule]:
    """A written-out stage layout has a stage for each chunk, and all the layers.

    With another number of chunks, Megatron-Core would leave some out without a word.
    """
    written = case.of_model(_STAGES)
    if not isinstance(written, (str, list, tuple)):
        return
    layout, stages = case.layout, stages_of(written)
    if len(stages) != layout.pp * layout.vpp:
        yield BrokenRule(
            rule=f"{_STAGES} must have pp * vpp stages",
            numbers=f"{len(stages)} stages, pp * vpp = {layout.pp} * {layout.vpp}",
            fix=either(
                *other_sizes(layout, ("pp", "vpp"), lambda o: o.pp * o.vpp == len(stages)),
                f"{layout.pp * layout.vpp} stages",
            ),
        )
    decoders = sum(map(decoder_layers, stages))
    if decoders != case.model.num_layers:
        yield BrokenRule(
            rule=f"{_STAGES} must have num_layers decoder layers",
            numbers=f"{decoders} of them, num_layers {case.model.num_layers}",
            fix=f"--model.num-layers {decoders}, or {case.model.num_layers} of them",
        )


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


def decoder_layers(stage: Sequence[Any]) -> int:
    if isinstance(stage, str):
        return stage.count("t")
    names = [str(getattr(layer, "name", layer)) for layer in stage]
    return sum(name.strip().lower() == "decoder" for name in names)


RULES: tuple[Rule, ...] = (
    interleaving_has_stages,
    interleaved_stages_pair_messages,
    plain_stages_do_not_overlap,
    layers_are_divided_in_one_way,
    layers_divide,
    stage_layout_fits,
    tied_weights_can_be_saved,
)
