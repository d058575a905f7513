"""`mcore-lab report`: one page of a run, which needs no other file, and says what is missing."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from schedules import one_f_one_b
from small_runs import SMALL, changed

from mcore_lab.cli import main
from mcore_lab.config import recipe_to_toml
from mcore_lab.recipes import load_recipe
from mcore_lab.training import RunFolder
from mcore_lab.training.metrics import StepMetrics

STEPS = 6
PIPELINE = changed(SMALL, layout={"pipeline_model_parallel_size": 2})


def written(folder: Path, *, ranks: int = 2, steps: int = STEPS, traced: bool = False) -> RunFolder:
    """Write the folder of a run by hand."""
    run = RunFolder(folder)
    run.begin(recipe_to_toml(PIPELINE, base=load_recipe(PIPELINE.name)), fresh=False)
    for step in range(1, steps + 1):
        run.record(
            StepMetrics(
                step=step,
                loss=5 / step,
                grad_norm=float("nan") if step == 2 else 1.0,
                lr=0.1,
                step_seconds=0.5,
                tokens_per_second=100.0 * step,
                peak_memory_bytes=1,
                tflops_per_rank=0.25 * step,
            )
        )
    run.record_validation(steps, 0.5)
    run.logs.mkdir()
    for rank in range(ranks):
        (run.logs / f"rank-{rank}.log").write_text("")
    for trace in one_f_one_b(2, 4) if traced else ():
        run.write_trace(f"rank-{trace.rank}.json", trace.to_json())
    return run


class Page(HTMLParser):
    """What a page refers to, its words, and whether each element that it opens is closed."""

    _VOID = ("meta", "br", "rect", "line", "path", "use", "circle")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.refers_to: list[str] = []
        self.tags: list[str] = []
        self.titles: list[str] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self._VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.refers_to += [v or "" for n, v in attrs if n in ("src", "href", "xlink:href", "data")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._open and self._open[-1] == "h2" and data.strip():
            self.titles.append(data.strip())


def page_of(run: RunFolder) -> Page:
    assert main(["report", str(run.path)]) == 0
    return Page((run.path / "report.html").read_text())


def test_the_page_begins_with_the_median_of_what_was_measured(tmp_path: Path) -> None:
    words = page_of(written(tmp_path / "run")).words
    assert "TFLOP/s a rank" in words and "0.875" in words
    # Nobody knows the peak of a CPU, and this model has no experts.
    assert "MFU" not in words and "imbalance" not in words


def test_a_traced_run_s_page_has_every_picture(tmp_path: Path) -> None:
    run = written(tmp_path / "run", traced=True)
    page = page_of(run)
    assert page.titles == [
        "Curves",
        "Ranks",
        "Matrices",
        "Timeline",
        "Communication",
        "Memory",
    ]
    assert page.tags.count("svg") == 6
    assert "bubble" in page.words and "(p-1)/(m+p-1)" in page.words and "20.0%" in page.words
    assert "missing" not in page.words and "not traced" not in page.words


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    run = written(tmp_path / "run", traced=True)
    page = page_of(run)
    assert all(reference.startswith("#") for reference in page.refers_to)
    assert not {"script", "link", "img", "iframe", "object", "image"} & {*page.tags}
    html = (run.path / "report.html").read_text()
    assert all(address.startswith("#") for address in re.findall(r"url\(['\"]?([^)]*)", html))
    assert "@import" not in html
    # The names of namespaces are no addresses of anything.
    addresses = set(re.findall(r"https?://[^\s\"'<]+", html))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_a_run_that_was_not_traced_has_a_page_that_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path / "run")
    page = page_of(run)
    assert page.titles == ["Curves", "Ranks", "Matrices"]
    assert "the run was not traced" in page.words and "--trace records them" in page.words
    told = capsys.readouterr()
    assert told.out == f"{run.path / 'report.html'}\n"
    assert told.err.startswith("missing: the run was not traced") and told.err.count("\n") == 1


def test_a_run_without_steps_or_with_ranks_that_nobody_counted_has_a_page(
    tmp_path: Path,
) -> None:
    page = page_of(written(tmp_path / "run", ranks=3, steps=0))
    assert page.titles == []
    assert "no step is recorded" in page.words and "how many ranks there were" in page.words


def test_without_matplotlib_the_page_says_how_to_have_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = page_of(written(tmp_path / "run"))
    assert "Curves" in page.titles and "pip install 'mcore-lab[plot]'" in page.words


def test_some_ranks_traces_are_missing_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = written(tmp_path / "run", traced=True)
    (run.trace / "rank-1.json").unlink()
    page = page_of(run)
    assert "of 2 ranks, 1 have left a trace here" in page.words
    assert page.tags.count("svg") == 6 and "bubble" not in page.words


def test_what_a_trace_says_is_text_and_no_markup(tmp_path: Path) -> None:
    run = written(tmp_path / "run", traced=True)
    trace = run.trace / "rank-0.json"
    trace.write_text(trace.read_text().replace('"clock":"none"', '"clock":"<script>"'))
    page = page_of(run)
    assert "script" not in page.tags and "<script>" in page.words


def test_json_has_the_numbers_of_the_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path / "run", traced=True)
    out = tmp_path / "page.html"
    assert main(["report", str(run.path), "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["page"] == str(out) and out.exists() and told["missing"] == []
    assert told["bubble"]["ideal"] == 1 / 5 == pytest.approx(told["bubble"]["measured"])
    assert [of_rank["weights"] for of_rank in told["memory"]] == [4, 4]


# What is wrong is told in a line.


def failing(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    return told


def test_a_folder_without_a_run_is_told_with_the_runs_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "tp2_gpt")
    told = failing(["report", str(tmp_path / "tp2_gtp")], capsys)
    assert "no run in" in told and f"did you mean {tmp_path / 'tp2_gpt'}?" in told


def test_a_trace_that_is_damaged_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path / "run", traced=True)
    (run.trace / "rank-1.json").write_text('{"rank": 1')
    told = failing(["report", str(run.path)], capsys)
    assert f"cannot read {run.trace / 'rank-1.json'}: not a rank's trace" in told


@pytest.mark.parametrize("words", [[], ["--out"], ["one", "two"], ["run", "--nproc", "2"]])
def test_a_command_line_that_is_not_understood_is_told(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "mcore-lab report --help" in failing(["report", *words], capsys)


def test_a_page_that_cannot_be_written_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path / "run")
    told = failing(["report", str(run.path), "--out", str(tmp_path / "no" / "page.html")], capsys)
    assert "there is no folder" in told
