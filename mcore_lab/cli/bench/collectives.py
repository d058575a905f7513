"""`mcore-lab bench collectives`: what they move and how fast, in the groups of a layout."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_lab import cpu
from mcore_lab.bench.collectives.bandwidth import BUS_FACTORS
from mcore_lab.bench.collectives.groups import GroupKind, kinds_of, world_kind
from mcore_lab.bench.collectives.results import CollectiveTimes, Halves, Measurement, Plan
from mcore_lab.cli.arguments import Parser, require_plottable, smallest_world
from mcore_lab.cli.bench.found import Found
from mcore_lab.cli.check import MEANING
from mcore_lab.errors import ConfigError, nearest
from mcore_lab.layout import SHORT_NAMES, ParallelLayout
from mcore_lab.report.tables import print_table

if TYPE_CHECKING:
    from mcore_lab.report.bandwidth_plot import Panel
    from mcore_lab.runtime import Device

_WHAT = """\
Check, count and time collectives: in the groups of a layout, all groups of a kind at once as in
training, or in the world of all ranks. What each leaves on a rank is compared with what it must."""
_EPILOG = """\
S, the bytes of a collective, is the larger buffer of a rank, rounded up to what the ranks of its
group can share. Bandwidths are NCCL-tests': algbw is S / t, busbw the bytes per rank / t. Of n
ranks the busiest sends or receives 2(n-1)/n S of an all-reduce, S of a broadcast, a reduce and a
send-recv, (n-1)/n S of the others. What it really did is counted, where TCP carries it."""
_SIZES_OF_GROUPS = ("tp", "cp", "pp", "ep", "etp")
"""What decides who is in which group, by the short names of a layout's fields."""
_COLUMNS = ("collective", "bytes", "per rank", "counted", "µs", "algbw", "busbw")
_COLUMNS_OF_HALVES = (
    *("kind", "bytes", "all-reduce µs", "reduce-scatter µs", "all-gather µs"),
    *("both halves µs", "ratio"),
)
_SMALLEST, _LARGEST = "1K", "4M"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def measure(argv: Sequence[str]) -> Found:
    """Return what each collective moves and how fast; draw it if asked."""
    options = _options(argv)
    kinds, nproc = _kinds(options)
    plan = Plan(
        kinds=tuple(kinds),
        collectives=_collectives(options.collectives),
        sizes=_sizes(options),
        rounds=_at_least(1, "--rounds", options.rounds),
    )
    require_plottable("--plot", options.plot)
    times, device = _measured(plan, nproc)
    if options.plot:
        _plot(options.plot, kinds, times, f"{nproc} ranks, {_on(device)}")
    return Found(
        values=_values(plan, times, nproc, device),
        as_json=options.json,
        tell=partial(_tell, plan, times, nproc, device),
        nproc=nproc,
    )


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="mcore-lab bench collectives", description=_WHAT, epilog=_EPILOG)
    add = parser.add_argument
    what = f"{', '.join(BUS_FACTORS)}; all of them if none is named"
    add("collectives", nargs="*", metavar="COLLECTIVE", help=what)
    what = "ranks on this machine; as few as the layout allows, and two at least, if not set"
    add("--nproc", type=int, metavar="N", help=what)
    add("--sizes", nargs="+", metavar="BYTES", help="such as 4096, 64K or 1M (powers of 1024)")
    add("--min-bytes", metavar="BYTES", help=f"in the place of --sizes: the smallest ({_SMALLEST})")
    add("--max-bytes", metavar="BYTES", help=f"and the largest ({_LARGEST})")
    add("--factor", type=int, metavar="N", help="and from one to the next (4)")
    add("--kinds", nargs="+", default=(), metavar="KIND", help="of groups: tp, dp-cp, world, ...")
    add("--rounds", type=int, default=7, metavar="N", help="the median is taken of (7)")
    add("--plot", metavar="FILE", type=Path, help="draw bandwidth by size into an SVG, PNG or PDF")
    add("--json", action="store_true", help="print JSON")
    layout = parser.add_argument_group("layout", "whose groups of more than one rank are measured")
    for short in _SIZES_OF_GROUPS:
        name = SHORT_NAMES[short]
        long = f"--layout.{name.replace('_', '-')}"
        names = (long, f"--layout.{short}", f"--{short}")
        layout.add_argument(*names, dest=name, type=int, metavar="N", help=MEANING[short])
    what = "which dimension's ranks are neighbours, the closest first"
    layout.add_argument("--layout.order", dest="order", metavar="tp-cp-ep-dp-pp", help=what)
    return parser.parse_intermixed_args(argv)


def _kinds(options: argparse.Namespace) -> tuple[list[GroupKind], int]:
    """Return the groups to measure, and the number of ranks."""
    fields = (*(SHORT_NAMES[short] for short in _SIZES_OF_GROUPS), "order")
    given = {name: value for name in fields if (value := getattr(options, name)) is not None}
    layout = ParallelLayout(**given)
    nproc = max(2, smallest_world(layout)) if options.nproc is None else options.nproc
    _at_least(2, "--nproc", nproc)
    if given or options.kinds:
        return kinds_of(layout, nproc, options.kinds), nproc
    return [world_kind(nproc)], nproc


def _collectives(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if name not in BUS_FACTORS:
            hint = nearest(name, BUS_FACTORS) or f"; there is {', '.join(BUS_FACTORS)}"
            raise ConfigError(f"no collective {name}{hint}")
    return tuple(name for name in BUS_FACTORS if name in names or not names)


def _sizes(options: argparse.Namespace) -> tuple[int, ...]:
    ends = (options.min_bytes, options.max_bytes, options.factor)
    if options.sizes:
        if any(end is not None for end in ends):
            raise ConfigError("either --sizes, or --min-bytes, --max-bytes and --factor")
        words = ",".join(options.sizes).split(",")
        return tuple(sorted({_bytes("--sizes", word) for word in words}))
    size = _bytes("--min-bytes", options.min_bytes or _SMALLEST)
    largest = _bytes("--max-bytes", options.max_bytes or _LARGEST)
    factor = _at_least(2, "--factor", 4 if options.factor is None else options.factor)
    if size > largest:
        raise ConfigError(f"--min-bytes is {size:,}, which is more than --max-bytes, {largest:,}")
    sizes = []
    while size <= largest:
        sizes.append(size)
        size *= factor
    return tuple(sizes)


def _bytes(option: str, text: str) -> int:
    match = re.fullmatch(r"(\d+)(?:([KMG]?)(?:I?B)?)", text.upper())
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"{option} expects bytes such as 4096, 64K or 1M; got {text}")
    return int(match[1]) * _UNITS[match[2]]


def _at_least(least: int, option: str, value: int) -> int:
    if value < least:
        raise ConfigError(f"{option} must not be below {least}; it is {value}")
    return value


def _measured(plan: Plan, nproc: int) -> tuple[CollectiveTimes, Device]:
    from mcore_lab.runtime import choose_device, launch

    device = choose_device(nproc)
    if device.type == "cpu":
        # Before all that imports Megatron-Core: it is done without its warnings and torch.compile.
        cpu.preload()
    from mcore_lab.bench.collectives.measure import measure_on_rank

    return launch(measure_on_rank, nproc, plan, device=device.type)[0], device


def _on(device: Device) -> str:
    return f"{device.communication} on {device.type}, torch {version('torch')}"


def _values(plan: Plan, times: CollectiveTimes, nproc: int, device: Device) -> dict[str, Any]:
    return {
        "nproc": nproc,
        "device": device.type,
        "communication": device.communication,
        "rounds": plan.rounds,
        "kinds": [asdict(kind) for kind in plan.kinds],
        **asdict(times),
    }


def _tell(plan: Plan, times: CollectiveTimes, nproc: int, device: Device) -> None:
    print(
        f"{nproc} ranks, {_on(device)}: µs are medians of {plan.rounds} rounds, of the slowest "
        "rank in each; algbw and busbw are GB/s\n"
    )
    print_table(("kind", "ranks of each group", "the same groups"), _group_rows(plan.kinds))
    for kind in plan.kinds:
        print(f"\n{_title(kind)}")
        print_table(_COLUMNS, [_row(one) for one in times.measurements if one.kind == kind.name])
    print("\neach left on every rank what it must")
    if times.halves:
        print("\nan all-reduce beside a reduce-scatter and an all-gather, which left the same")
        print_table(_COLUMNS_OF_HALVES, list(map(_halves, times.halves)))


def _group_rows(kinds: Sequence[GroupKind]) -> list[tuple[str, ...]]:
    return [
        (
            kind.name,
            "  ".join(" ".join(map(str, ranks)) for ranks in kind.groups),
            " ".join(kind.also),
        )
        for kind in kinds
    ]


def _row(one: Measurement) -> tuple[str, ...]:
    return (
        one.collective,
        f"{one.size:,}",
        f"{one.bytes_per_rank:,}",
        "-" if one.bytes_counted is None else f"{one.bytes_counted:,}",
        _microseconds(one.seconds),
        f"{one.algorithm_bandwidth / 1e9:.4f}",
        f"{one.bus_bandwidth / 1e9:.4f}",
    )


def _halves(one: Halves) -> tuple[str, ...]:
    took = (one.all_reduce_seconds, one.reduce_scatter_seconds, one.all_gather_seconds)
    times = map(_microseconds, (*took, one.both_seconds))
    return (one.kind, f"{one.size:,}", *times, f"{one.ratio:.2f}")


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}"


def _plot(file: Path, kinds: Sequence[GroupKind], times: CollectiveTimes, on: str) -> None:
    from mcore_lab.report.bandwidth_plot import plot_bandwidths

    panels = [_panel(kind, times) for kind in kinds]
    try:
        plot_bandwidths(file, f"Collectives: {on}", panels, list(BUS_FACTORS))
    except OSError as error:
        raise ConfigError(f"--plot {file}: {error.strerror}") from None
    print(f"written to {file}", file=sys.stderr)


def _panel(kind: GroupKind, times: CollectiveTimes) -> Panel:
    from mcore_lab.report.bandwidth_plot import Panel

    curves: dict[str, list[tuple[int, float]]] = {}
    for one in times.measurements:
        if one.kind == kind.name:
            curves.setdefault(one.collective, []).append((one.size, one.bus_bandwidth))
    return Panel(title=_title(kind), curves=curves)


def _title(kind: GroupKind) -> str:
    many = "s" * (len(kind.groups) > 1)
    return f"{kind.name}: {len(kind.groups)} group{many} of {kind.ranks} ranks"
