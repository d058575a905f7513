"""A run as one page: its curves, who held what, and what was traced of it.

What goes in is plain data; what comes out is HTML that needs no other file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from statistics import median
from typing import Any

from mcore_lab.errors import BackendError
from mcore_lab.layout import ParallelLayout, rank_shares
from mcore_lab.layout.matrices import matrix_cuts
from mcore_lab.layout.rules.case import DataShape, ModelShape
from mcore_lab.layout.words import in_words, sizes_in_use
from mcore_lab.report.communication import Traffic, communication_svg, mean_traffic
from mcore_lab.report.curves import curves_svg
from mcore_lab.report.html import facts, folded, table, title
from mcore_lab.report.matching import Meeting, Place, meetings
from mcore_lab.report.matrices_svg import matrices_svg
from mcore_lab.report.memory_svg import MOST_RANKS, memory_svg
from mcore_lab.report.page_style import PAGE
from mcore_lab.report.rank_map import rank_map_svg
from mcore_lab.report.rank_trace import MEMORY_KINDS, RankTrace
from mcore_lab.report.svg import amount
from mcore_lab.report.timeline import Bubble, bubble
from mcore_lab.report.timeline_svg import timeline_svg, typical_step

_MEDIANS = {
    "tokens_per_second": ("tokens a second", "{:,.0f}"),
    "tflops_per_rank": ("TFLOP/s a rank", "{:.3g}"),
    "mfu": ("MFU", "{:.1%}"),
    "expert_imbalance": ("expert imbalance", "{:.2f}"),
}
"""Of all steps; how each is told."""

_MOST_DRAWN = 64
"""Ranks of which a map is drawn."""


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Everything that a page tells of a run."""

    name: str
    layout: ParallelLayout
    model: ModelShape
    data: DataShape
    vocab_size: int
    """Rows of the embedding."""
    backend: str
    """What layers are built of: `torch` or `te`."""
    world_size: int | None
    """None where it is not known how many ranks there were."""
    metrics: Sequence[Mapping[str, Any]]
    validations: Sequence[Mapping[str, Any]]
    traces: Sequence[RankTrace]
    """Of each rank; none if the run was not traced."""

    @cached_property
    def meetings(self) -> Mapping[Place, Meeting]:
        """Which calls of the ranks are one operation."""
        return meetings(self.traces)

    @cached_property
    def bubble(self) -> Bubble | None:
        """What was idle of the pipeline's time; None without a pipeline or a trace."""
        return bubble(self.traces, self.meetings) if self.traces else None

    @cached_property
    def traffic(self) -> list[Traffic]:
        """What ranks communicated, per step and rank."""
        return mean_traffic(self.traces, self.meetings)

    def missing(self) -> list[str]:
        """Return what there is no picture of, and how to have it."""
        found = []
        if not self.metrics:
            found.append("no step is recorded: no curves")
        if not self.traces:
            found.append(
                "the run was not traced: no timeline, no communication, no memory "
                "(mcore-lab run … --trace records them)"
            )
        elif len(self.traces) < self.traces[0].world_size:
            found.append(
                f"of {self.traces[0].world_size} ranks, {len(self.traces)} have left a trace here"
            )
        if self.world_size is None:
            found.append("how many ranks there were is not recorded: no map of ranks, no matrices")
        return found


def run_page(report: RunReport) -> str:
    """Return a self-contained HTML page of a run."""
    parts = [
        *_head(report),
        *_curves(report),
        *(_ranks(report, report.world_size) if report.world_size else ()),
        *(_traced(report) if report.traces else ()),
    ]
    return PAGE.format(title=escape(f"{report.name}: a run"), body="\n".join(parts))


def _head(report: RunReport) -> Iterator[str]:
    known: dict[str, object] = {}
    if report.world_size:
        split = in_words(sizes_in_use(report.layout, report.world_size))
        known |= {"ranks": report.world_size, "layout": split or "one rank"}
    if report.metrics:
        last = report.metrics[-1]
        known |= {
            "steps": last["step"],
            "last loss": f"{float(last['loss']):.4f}",
        }
        known |= {
            title: form.format(median(measured))
            for name, (title, form) in _MEDIANS.items()
            if (measured := [line[name] for line in report.metrics if line.get(name) is not None])
        }
    if report.traces:
        one = report.traces[0]
        known |= {
            "device": one.device,
            "backend": one.backend,
            "Megatron-Core": one.megatron_core,
            "torch": one.torch,
        }
    yield f'<header class="run"><h1>{escape(report.name)}</h1>{facts(known)}'
    if missing := report.missing():
        yield f"<ul>{''.join(f'<li>{escape(what)}</li>' for what in missing)}</ul>"
    yield "</header>"


def _curves(report: RunReport) -> Iterator[str]:
    if not report.metrics:
        return
    yield title("Curves", "of each step, as rank 0 measured it")
    try:
        yield _figure(curves_svg(report.metrics, report.validations))
    except BackendError as error:
        yield f"<p>{escape(str(error))}</p>"


def _ranks(report: RunReport, world_size: int) -> Iterator[str]:
    layout, model, data = report.layout, report.model, report.data
    yield title("Ranks", "where each stands, and what it holds")
    if world_size <= _MOST_DRAWN:
        shares = rank_shares(layout, model, data, world_size)
        yield _figure(rank_map_svg(f"{report.name} on {world_size} ranks", shares))
    kinds = ["tp", "cp", "pp", "dp", *(["ep", "etp", "edp"] if model.num_moe_experts else [])]
    groups = {kind: layout.groups(kind, world_size) for kind in kinds}
    rows = [
        (kind, "&ensp;|&ensp;".join(" ".join(map(str, ranks)) for ranks in members))
        for kind, members in groups.items()
        if world_size <= _MOST_DRAWN
    ]
    yield table(("groups", "ranks"), rows) if rows else f"<p>{world_size} ranks are not drawn</p>"
    yield title("Matrices", "of a layer, and who holds which rows or columns of each")
    longest = layout.padded(data.sequence_length)
    cuts = matrix_cuts(layout, model, report.vocab_size, longest, report.backend)
    yield _figure(matrices_svg(report.name, layout, cuts, world_size))


def _traced(report: RunReport) -> Iterator[str]:
    traces, found = report.traces, report.meetings
    typical = typical_step(traces)
    yield title("Timeline", f"recorded from step {typical}, of median length")
    yield _figure(timeline_svg(report.name, traces, found, typical))
    yield from _bubble(report)
    others = [step.step for step in traces[0].steps if step.step != typical]
    if others:
        drawn = [_figure(timeline_svg(report.name, traces, found, step)) for step in others]
        yield folded(f"{len(others)} more traced steps", "\n".join(drawn))
    yield (
        "<p>All of it, to zoom into: open the run's <code>trace/chrome_trace.json</code> in "
        "Perfetto or chrome://tracing.</p>"
    )
    yield title("Communication", "counted from the calls of process groups, per step")
    yield _figure(communication_svg(report.name, traces, found))
    columns = ("group", "ranks", "collective", "calls", "bytes", "sent", "ms", "of it waiting")
    yield table(columns, map(_traffic_row, report.traffic))
    yield (
        "<p>Means over all ranks. Bytes are of the whole operation, as NCCL-tests counts them; "
        "sent is what a rank has to send at least. The time is that in which a rank does nothing "
        "else; of it, waiting is before the last rank of the operation had come to it.</p>"
    )
    yield title("Memory", "of tensors, by kind")
    yield _figure(memory_svg(report.name, traces))
    yield table(("rank", *MEMORY_KINDS, "together"), map(_memory_row, traces[:MOST_RANKS]))
    yield f"<p>{escape(_how(traces))}</p>"


def _bubble(report: RunReport) -> Iterator[str]:
    if (idle := report.bubble) is None:
        return
    formula = "(p-1)/(m+p-1)" if idle.chunks == 1 else "(p-1)/(v·m+p-1)"
    columns = ("bubble", formula, *(f"stage {stage}" for stage in range(idle.stages)))
    shares = (idle.measured, idle.ideal, *idle.by_stage)
    yield table(columns, [[f"{share:.1%}" for share in shares]])
    one = report.traces[0]
    yield (
        "<p>The share of the pipeline's time, from its first forward to its last backward pass, in "
        f"which a stage computes neither: p = {idle.stages} stages, m = {idle.microbatches} "
        f"micro-batches, v = {idle.chunks} chunk{'s' * (idle.chunks > 1)} of each. In "
        f"{idle.waiting:.1%} of it stages wait for each other, in {idle.moving:.1%} messages are "
        "on their way. The formula is of stages that take the same time, and of messages that "
        "take none.</p>"
    )
    if one.device == "cpu" and one.ranks_here > one.cores:
        yield (
            f"<p>{one.ranks_here} ranks share {one.cores} cores here and take turns: what is idle "
            "is not what it would be with a processor each.</p>"
        )


def _traffic_row(one: Traffic) -> tuple[str, ...]:
    return (
        escape(one.group),
        str(one.ranks),
        escape(one.op),
        f"{one.calls:g}",
        amount(one.size),
        amount(one.sent),
        f"{one.seconds * 1e3:.3g}",
        f"{one.waiting * 1e3:.3g}",
    )


def _memory_row(trace: RankTrace) -> tuple[str, ...]:
    kinds = [trace.memory.get(kind) for kind in MEMORY_KINDS]
    cells = ["not counted" if size is None else f"{size:,}" for size in kinds]
    return (str(trace.rank), *cells, f"{sum(trace.memory.values()):,}")


def _how(traces: Sequence[RankTrace]) -> str:
    one = traces[0]
    steps = ", ".join(str(step.step) for step in one.steps)
    return (
        f"Traced: steps {steps}. Clock: {one.clock}. Activations are the most bytes of tensors "
        "that a forward and backward pass had made at a time, counted in the step before; memory "
        "that tensors share counts once."
    )


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>"
