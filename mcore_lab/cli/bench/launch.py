"""`mcore-lab bench launch`: how long it takes until ranks stand in a process group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from mcore_lab.bench.launch import WAYS, Launched
from mcore_lab.bench.launch import measure as measure_launches
from mcore_lab.cli.arguments import Parser
from mcore_lab.cli.bench.found import Found
from mcore_lab.errors import ConfigError
from mcore_lab.report.tables import print_table

_WHAT = """\
Start ranks in several ways, side by side, and time how long it takes until all of them have the sum
of their first all-reduce: with Python's start, and with the imports of torch and Megatron-Core."""
_EPILOG = "; ".join(f"{way}: {what}" for way, what in WAYS.items())


def measure(argv: Sequence[str]) -> Found:
    """Return how long each way takes to each number of ranks."""
    parser = Parser(prog="mcore-lab bench launch", description=_WHAT, epilog=_EPILOG)
    add = parser.add_argument
    what = "numbers of ranks on this machine (1 2 4 8)"
    add("--nproc", nargs="+", type=int, default=(1, 2, 4, 8), metavar="N", help=what)
    what = "the median is taken of (3); a round takes two minutes on two cores"
    add("--rounds", type=int, default=3, metavar="N", help=what)
    add("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    for option, value in (("--nproc", min(options.nproc)), ("--rounds", options.rounds)):
        if value < 1:
            raise ConfigError(f"{option} must not be below 1; it is {value}")
    found = measure_launches(sorted(set(options.nproc)), options.rounds)
    return Found(
        values={"launches": [asdict(one) for one in found]},
        as_json=options.json,
        tell=partial(_tell, found),
    )


def _tell(found: Sequence[Launched]) -> None:
    columns = ("ranks", "way", "s", "least", "most", "ratio")
    print_table(columns, [_row(one) for one in found])
    print(f"\nmedians of {found[0].rounds} rounds, by that of mcore-lab; all ways in each round")


def _row(one: Launched) -> tuple[object, ...]:
    took = (f"{seconds:.2f}" for seconds in (one.seconds, one.least, one.most))
    return one.nproc, one.way, *took, f"{one.ratio:.2f}"
