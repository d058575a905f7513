"""The benchmark of collectives: what it counts and checks; its times are not a test's to judge."""

from __future__ import annotations

import json
import socket
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_ranks import GROUPS, initialize, rank_of_world
from layout_cases import layout_of

import mcore_lab.runtime
from mcore_lab.bench.collectives import bandwidth
from mcore_lab.bench.collectives.bandwidth import BUS_FACTORS
from mcore_lab.bench.collectives.groups import GroupKind, kinds_of, world_kind
from mcore_lab.bench.collectives.measure import Bench, CollectiveError, measure_on_rank
from mcore_lab.bench.collectives.operations import OPERATIONS, Buffers
from mcore_lab.bench.collectives.results import CollectiveTimes, Plan
from mcore_lab.bench.collectives.traffic import among_ranks, bytes_sent
from mcore_lab.cli import main
from mcore_lab.layout import ParallelLayout
from mcore_lab.report.bandwidth_plot import Panel, plot_bandwidths
from mcore_lab.runtime import launch, process_group

ALL = tuple(BUS_FACTORS)
LARGE = 2**18


def test_bytes_and_bandwidths_are_those_of_nccl_tests_by_hand() -> None:
    # Of 4 ranks, 4,000,000 bytes in 2 ms: 2 GB/s, and of a bus what the ring makes of it.
    by_hand = {
        "broadcast": (4_000_000, 2.0),
        "scatter": (3_000_000, 1.5),
        "gather": (3_000_000, 1.5),
        "reduce": (4_000_000, 2.0),
        "all-gather": (3_000_000, 1.5),
        "all-reduce": (6_000_000, 3.0),
        "reduce-scatter": (3_000_000, 1.5),
        "all-to-all": (3_000_000, 1.5),
        "send-recv": (4_000_000, 2.0),
    }
    assert by_hand.keys() == BUS_FACTORS.keys() == OPERATIONS.keys()
    assert bandwidth.algorithm_bandwidth(4_000_000, 0.002) == 2e9
    for name, (moved, gigabytes) in by_hand.items():
        assert bandwidth.bytes_per_rank(name, 4, 4_000_000) == moved
        assert bandwidth.bus_bandwidth(name, 4, 4_000_000, 0.002) == pytest.approx(gigabytes * 1e9)
    # Of two ranks an all-reduce sends as much as there is, of eight 7/4 of it.
    assert bandwidth.bytes_per_rank("all-reduce", 2, 4096) == 4096
    assert bandwidth.bytes_per_rank("all-reduce", 8, 4096) == 7168


LAYOUTS = [
    (layout_of(tp=2), 4),
    (layout_of(tp=2, cp=2, pp=2), 16),
    (layout_of(pp=4), 8),
    (layout_of(tp=2, ep=2, etp=1), 8),
    (layout_of(tp=2, cp=2, pp=2, ep=2, etp=2), 16),
    (layout_of(tp=2, cp=2, order="cp-tp-ep-dp-pp"), 8),
]


@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS)
def test_groups_are_those_of_more_than_one_rank_that_parallel_state_builds(
    layout: ParallelLayout, world_size: int
) -> None:
    kinds = kinds_of(layout, world_size)
    assert len({kind.groups for kind in kinds}) == len(kinds), "the same groups are measured once"
    for rank in range(world_size):
        mine = {
            name: ranks
            for kind in kinds
            for name in (kind.name, *kind.also)
            for ranks in kind.groups
            if rank in ranks
        }
        with rank_of_world(rank, world_size):
            initialize(layout)
            groups = [(kind, group()) for kind, group in GROUPS.items()]
            built = {
                kind: tuple(dist.get_process_group_ranks(group))
                for kind, group in groups
                if group is not None
            }
        assert mine == {kind: ranks for kind, ranks in built.items() if len(ranks) > 1}


@pytest.fixture(scope="module")
def of_four_ranks() -> CollectiveTimes:
    """All collectives in the pairs of two dimensions, and in the world."""
    layout = ParallelLayout(tensor_model_parallel_size=2)
    kinds = kinds_of(layout, 4, ("tp", "dp", "world"))
    plan = Plan(kinds=tuple(kinds), collectives=ALL, sizes=(1000, LARGE), rounds=2)
    results = launch(measure_on_rank, 4, plan, timeout=120)
    assert all(result == results[0] for result in results), "the slowest rank is every rank's"
    return results[0]


def test_every_collective_is_measured_in_every_kind_at_every_size(
    of_four_ranks: CollectiveTimes,
) -> None:
    found = [(one.kind, one.collective, one.size) for one in of_four_ranks.measurements]
    # 1000 bytes are 250 numbers: two ranks can share them, four take 252.
    sizes = {"tp": (1000, LARGE), "dp": (1000, LARGE), "world": (1008, LARGE)}
    assert found == [(kind, name, size) for kind in sizes for name in ALL for size in sizes[kind]]
    for one in of_four_ranks.measurements:
        assert (one.groups, one.ranks) == ((1, 4) if one.kind == "world" else (2, 2))
        assert one.seconds > 0
        assert one.algorithm_bandwidth == one.size / one.seconds
        assert one.bus_bandwidth == one.bytes_per_rank / one.seconds


def test_the_kernel_counts_the_bytes_that_the_definitions_say(
    of_four_ranks: CollectiveTimes,
) -> None:
    counted = {
        (one.kind, one.collective): (one.bytes_counted, one.bytes_per_rank)
        for one in of_four_ranks.measurements
        if one.size == LARGE
    }
    for (kind, name), (sent, said) in counted.items():
        assert sent is not None and sent >= said, (kind, name)
    # Gloo's trees (broadcast, reduce) send more from a rank than a ring does, and its
    # reduce-scatter is an all-reduce; of these the definitions are what is sent.
    exact = ("scatter", "gather", "all-gather", "all-reduce", "all-to-all", "send-recv")
    for kind in ("tp", "dp", "world"):
        for name in exact:
            sent, said = counted[kind, name]
            assert sent == pytest.approx(said, rel=0.01), (kind, name)


def test_an_all_reduce_is_shown_beside_its_two_halves(of_four_ranks: CollectiveTimes) -> None:
    seconds = {
        (one.kind, one.size, one.collective): one.seconds for one in of_four_ranks.measurements
    }
    assert len(of_four_ranks.halves) == 6
    for one in of_four_ranks.halves:
        assert one.all_reduce_seconds == seconds[one.kind, one.size, "all-reduce"]
        assert one.reduce_scatter_seconds == seconds[one.kind, one.size, "reduce-scatter"]
        assert one.all_gather_seconds == seconds[one.kind, one.size, "all-gather"]
        assert one.ratio == one.both_seconds / one.all_reduce_seconds


def test_a_rank_that_is_in_no_group_of_a_kind_waits_for_the_others() -> None:
    layout = ParallelLayout(pipeline_model_parallel_size=3)
    kinds = kinds_of(layout, 3, ("pp", "embedding"))
    assert [kind.groups for kind in kinds] == [((0, 1, 2),), ((0, 2),)]
    plan = Plan(kinds=tuple(kinds), collectives=ALL, sizes=(1024,), rounds=1)
    times = launch(measure_on_rank, 3, plan, timeout=120)[1]
    assert [one.size for one in times.halves] == [1032, 1024]
    assert len(times.measurements) == 2 * len(ALL)


def _leave_nothing(*args: Any, **kwargs: Any) -> None:
    """A collective that does nothing."""


def _of_the_next_rank(real: Callable[..., None]) -> Callable[..., None]:
    def collective(*args: Any, group: dist.ProcessGroup, **kwargs: Any) -> None:
        name = "group_src" if "group_src" in kwargs else "group_dst"
        real(*args, group=group, **kwargs | {name: kwargs[name] + 1})

    return collective


def _to_the_wrong_place(real: Callable[..., None]) -> Callable[..., None]:
    def collective(output: torch.Tensor, source: torch.Tensor, **kwargs: Any) -> None:
        real(output, source, **kwargs)
        output.copy_(output.roll(1))

    return collective


def _with_the_maximum(real: Callable[..., None]) -> Callable[..., None]:
    def collective(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs | {"op": dist.ReduceOp.MAX})

    return collective


def _in_the_world(real: Callable[..., None]) -> Callable[..., None]:
    def collective(tensor: torch.Tensor, group: object = None, **kwargs: Any) -> None:
        real(tensor, **kwargs)

    return collective


def _first_of(*names: str) -> str:
    return next(name for name in names if hasattr(dist, name))


PLANTED = {
    "broadcast": ("broadcast", _of_the_next_rank),
    "scatter": ("scatter", lambda real: _leave_nothing),
    "reduce": ("reduce", _with_the_maximum),
    "all-gather": (_first_of("all_gather_single", "all_gather_into_tensor"), _to_the_wrong_place),
    "all-reduce": ("all_reduce", _in_the_world),
    "reduce-scatter": (
        _first_of("reduce_scatter_single", "reduce_scatter_tensor"),
        _with_the_maximum,
    ),
    "all-to-all": ("all_to_all_single", _to_the_wrong_place),
    "send-recv": ("batch_isend_irecv", lambda real: lambda operations: []),
}
"""For each collective the function of torch's behind it, and what is wrong with the planted one."""


def _what_is_said_of_planted_errors() -> dict[str, str]:
    kind = GroupKind(name="tp", groups=((0, 1), (2, 3)))
    said = {}
    with process_group() as world:
        group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in kind.groups])
        for collective, (function, planted) in PLANTED.items():
            plan = Plan(kinds=(kind,), collectives=(collective,), sizes=(64,), rounds=1)
            bench = Bench(plan, world, kind, group, 64)
            bench.require_values()
            # The check itself sums what the ranks have found.
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist, function, planted(getattr(dist, function)))
                try:
                    bench.require_values()
                except CollectiveError as error:
                    said[collective] = str(error)
    return said


def test_a_collective_that_leaves_a_wrong_value_is_named_on_every_rank() -> None:
    for said in launch(_what_is_said_of_planted_errors, 4, timeout=120):
        assert said.keys() == PLANTED.keys()
        for collective, message in said.items():
            assert message.startswith(f"{collective} in the tp groups of 2 ranks left "), message
            assert " values wrong on rank " in message and " must be" in message


def _halves_with_planted_sum() -> str:
    kind = world_kind(2)
    plan = Plan(kinds=(kind,), collectives=ALL, sizes=(64,), rounds=1)
    with process_group() as world, pytest.MonkeyPatch.context() as patch:
        bench = Bench(plan, world, kind, dist.group.WORLD, 64)
        real = OPERATIONS["all-reduce"]
        # Wrong, and all the same what is expected of it: only its two halves tell.
        patch.setattr(dist, "all_reduce", _with_the_maximum(dist.all_reduce))
        bench._operations["all-reduce"] = real._replace(must_leave=_maximum)
        with pytest.raises(CollectiveError) as raised:
            bench.require_values()
        return str(raised.value)


def _maximum(on: Buffers) -> torch.Tensor:
    return torch.stack(list(on.everyones())).amax(dim=0)


def test_an_all_reduce_is_held_against_a_reduce_scatter_and_an_all_gather() -> None:
    for message in launch(_halves_with_planted_sum, 2, timeout=120):
        assert message.startswith("reduce-scatter + all-gather in the world groups of 2 ranks")


def test_bytes_are_counted_once_for_the_rank_that_sends_and_for_the_one_that_receives() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
        with sender, receiver:
            files, before = _open_files(), bytes_sent()
            sender.sendall(bytes(1000))
            received = 0
            while received < 1000:
                received += len(receiver.recv(1000))
            after = bytes_sent()
            assert _open_files() == files
            there = (sender.getsockname(), receiver.getsockname())
    assert before is not None and after is not None
    assert after[there] - before[there] == 1000
    assert after[there[::-1]] == before[there[::-1]]
    ranks = [{there: 1000, (there[0], ("127.0.0.1", 1)): 50}, {there[::-1]: 3}]
    assert among_ranks(ranks) == [(1000, 3), (3, 1000)], "50 went to none of the ranks"


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# The command.


def lab(*words: str) -> int:
    return main(["bench", "collectives", *words])


def test_json_has_all_that_was_measured_and_a_plot_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "plot.svg"
    words = ("all-reduce", "broadcast", "--tp", "2", "--sizes", "1K,4096", "--rounds", "1")
    assert lab(*words, "--nproc", "4", "--kinds", "tp", "dp", "--json", "--plot", str(picture)) == 0
    said = capsys.readouterr()
    assert said.err == f"written to {picture}\n"
    found = json.loads(said.out)
    assert (found["nproc"], found["device"], found["communication"]) == (4, "cpu", "gloo")
    assert found["kinds"] == [
        {"name": "tp", "groups": [[0, 1], [2, 3]], "also": []},
        {"name": "dp", "groups": [[0, 2], [1, 3]], "also": []},
    ]
    assert [(one["kind"], one["collective"], one["size"]) for one in found["measurements"]] == [
        (kind, name, size)
        for kind in ("tp", "dp")
        for name in ("broadcast", "all-reduce")
        for size in (1024, 4096)
    ]
    assert found["halves"] == []
    root = ElementTree.parse(picture).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    ids = [element.get("id", "") for element in root.iter()]
    assert {"axes_1", "axes_2", "legend_1"} <= set(ids)


def test_the_table_has_a_row_for_each_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--max-bytes", "4K", "--min-bytes", "2K", "--factor", "2", "--rounds", "1")
    assert lab(*words) == 0
    said = capsys.readouterr()
    assert not said.err
    lines = said.out.splitlines()
    assert lines[0].startswith("2 ranks, gloo on cpu, torch ")
    for name in ALL:
        rows = [line.split() for line in lines if line.startswith(f"{name} ")]
        assert [row[1:3] for row in rows] == [
            [f"{size:,}", f"{bandwidth.bytes_per_rank(name, 2, size):,}"] for size in (2048, 4096)
        ]
    assert "world: 1 group of 2 ranks" in lines
    assert "each left on every rank what it must" in lines


def test_a_picture_has_a_line_and_a_marker_of_its_own_for_each_collective(tmp_path: Path) -> None:
    from matplotlib.image import imread

    curves = {name: [(1024, 1e6 * (1 + i)), (2**20, 1e9)] for i, name in enumerate(ALL)}
    panels = [Panel(title=f"{kind}: 2 groups of 2 ranks", curves=curves) for kind in "abcd"]
    plot_bandwidths(tmp_path / "plot.png", "4 ranks", panels, ALL)
    pixels = imread(tmp_path / "plot.png")
    assert pixels.shape[:2] == (int(8.0 * 150), int(16.2 * 150))
    assert pixels[..., :3].min() < 0.1 < 0.9 < pixels[..., :3].max()
    plot_bandwidths(tmp_path / "plot.svg", "4 ranks", panels, ALL)
    svg = (tmp_path / "plot.svg").read_text()
    for colour in ("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#cc6677", "#882255"):
        assert svg.lower().count(f"stroke: {colour}") >= len(panels), colour


WRONG = {
    "allreduce": "no collective allreduce; did you mean all-reduce or reduce or reduce-scatter?",
    "tp2_gpt": f"no collective tp2_gpt; there is {', '.join(ALL)}",
    "--nproc 1": "--nproc must not be below 2; it is 1",
    "--nproc 3 --tp 2": "world size must be a multiple of tp * cp * pp: world size 3, "
    "tp * cp * pp = 2 * 1 * 1 = 2; use --layout.tp 1 or 3, or 2 or 4 ranks",
    "--layout.order tp-foo --layout.tp 2": "order must name each of tp, cp, ep, dp and pp once; "
    "one of size 1 may be left out: order 'tp-foo'; use --layout.order tp-cp-ep-dp-pp",
    "--nproc 8 --tp 2 --ep 2 --etp 1 --pp 2 --cp 2 --layout.order tp-pp-dp-cp-ep": "unless pp is "
    "last in the order, dense layers and experts must have the same dp and the same pipelines: "
    "order tp-pp-dp-cp-ep, dp 1 and 2, next stage 2 and 1 ranks away; "
    "use --layout.order tp-dp-cp-ep-pp",
    "--kinds tp-cpp": "there are no groups of kind 'tp-cpp'; did you mean tp or pp or cp?",
    "--kinds cp --tp 2": "each cp group of this layout on 2 ranks is one rank, which has nobody to "
    "exchange with; tp, etp, tp-cp, tp-pp, tp-dp, tp-dp-cp, etp-ep, etp-ep-pp are larger",
    "--sizes 1T": "--sizes expects bytes such as 4096, 64K or 1M; got 1T",
    "--sizes 1K --max-bytes 1M": "either --sizes, or --min-bytes, --max-bytes and --factor",
    "--min-bytes 8M": "--min-bytes is 8,388,608, which is more than --max-bytes, 4,194,304",
    "--factor 1": "--factor must not be below 2; it is 1",
    "--rounds 0": "--rounds must not be below 1; it is 0",
    "--plot a.jpg": "--plot a.jpg: a file that ends in .svg, .png, .pdf",
    "--plot nowhere/a.svg": "--plot nowhere/a.svg: there is no folder nowhere",
    "--tensor 2": "unrecognized arguments: --tensor; see mcore-lab bench collectives --help",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_measured_is_told_in_a_line_before_a_rank_is_started(
    words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mcore_lab.runtime, "launch", _leave_nothing)
    assert lab(*words.split()) == 2
    said = capsys.readouterr()
    assert said.err == f"error: {WRONG[words]}\n"
    assert not said.out


def test_sizes_that_memory_does_not_hold_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert lab("broadcast", "--sizes", "900000G") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: collectives of 966,367,641,600,000 bytes need ")
    assert said.count("\n") == 1
