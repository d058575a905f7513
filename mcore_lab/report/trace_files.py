"""What a trace is made into: the pictures and the Chrome trace of a run folder's `trace/`."""

from __future__ import annotations

from collections.abc import Sequence

from mcore_lab.report.chrome_trace import chrome_trace
from mcore_lab.report.communication import communication_svg
from mcore_lab.report.matching import meetings
from mcore_lab.report.memory_svg import memory_svg
from mcore_lab.report.rank_trace import RankTrace
from mcore_lab.report.timeline_svg import timeline_svg, typical_step


def trace_files(name: str, traces: Sequence[RankTrace]) -> dict[str, str]:
    """Return the content of each file, by its name, of a run called `name`."""
    found = meetings(traces)
    return {
        "chrome_trace.json": chrome_trace(name, traces, found),
        "timeline.svg": timeline_svg(name, traces, found, typical_step(traces)),
        "communication.svg": communication_svg(name, traces, found),
        "memory.svg": memory_svg(name, traces),
    }
