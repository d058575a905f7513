"""The benchmark of launches starts ranks in each way for real; its times are not judged."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from mcore_lab.bench import launch as launching
from mcore_lab.bench.launch import WAYS, seconds_to_stand
from mcore_lab.bench.stand import stand
from mcore_lab.cli import main
from mcore_lab.errors import RankFailedError
from mcore_lab.runtime import launch


def test_each_rank_leaves_the_time_at_which_all_have_the_sum(tmp_path: Path) -> None:
    before = time.monotonic()
    launch(stand, 2, tmp_path, timeout=60)
    left = [float((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert before < min(left) <= max(left) < time.monotonic()


def test_a_command_that_fails_is_named_with_what_it_said_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = "import sys; sys.stderr.write('first\\n'); sys.exit('no such thing')"
    monkeypatch.setattr(launching, "_command", lambda *_: [sys.executable, "-c", program])
    with pytest.raises(RankFailedError) as raised:
        seconds_to_stand("torchrun", 3)
    assert str(raised.value) == "torchrun with 3 ranks ended with 1: no such thing"


@pytest.mark.parametrize("options", [["--nproc", "0"], ["--rounds", "0"], ["--nproc", "2", "-1"]])
def test_numbers_that_start_nothing_are_refused_in_a_line(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "launch", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.slow
def test_ranks_are_started_in_all_ways_in_each_round(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "launch", "--nproc", "2", "--rounds", "2", "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    found = json.loads(said.out)["launches"]
    assert [(one["way"], one["nproc"], one["rounds"]) for one in found] == [
        (way, 2, 2) for way in WAYS
    ]
    for one in found:
        assert 0 < one["least"] <= one["seconds"] <= one["most"]
        assert one["ratio"] == pytest.approx(one["seconds"] / found[0]["seconds"])
    # What imports nothing any more takes less than what does.
    assert found[-1]["most"] < min(one["least"] for one in found[:-1])
