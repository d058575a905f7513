"""The page of a verification: what a browser shows of it, without any other file."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from mcore_lab.report.heat_map import LEVELS, level, place, short, strain
from mcore_lab.report.page_style import COLOURS
from mcore_lab.report.verification_page import verification_page
from mcore_lab.verify.compare import Verdict
from mcore_lab.verify.report import VerificationReport

QKV = "self_attention.linear_qkv"
WEIGHTS = (
    "embedding.word_embeddings.weight",
    *(f"decoder.layers.{n}.{QKV}.{part}" for n in range(3) for part in ("weight", "bias")),
    *(f"decoder.layers.2.mlp.experts.experts.{n}.linear_fc1.weight" for n in range(40)),
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)


def verdict(kind: str, name: str, error: float = 1e-7, **more: Any) -> Verdict:
    return Verdict(kind=kind, name=name, error=error, tolerance=1e-5, ratio=1.0, **more)


RIGHT = VerificationReport(
    recipe="tp2_gpt",
    layout={"tp": 2, "sp": True},
    world_size=4,
    precision="fp32",
    steps=2,
    verdicts=(
        verdict("loss", "step 1, micro-batch 1"),
        *(verdict("gradient", name) for name in reversed(WEIGHTS)),
        *(verdict("weight", name) for name in WEIGHTS),
    ),
)


def with_error(kind: str, name: str, error: float, **more: Any) -> VerificationReport:
    verdicts = tuple(
        replace(one, error=error, **more) if (one.kind, one.name) == (kind, name) else one
        for one in RIGHT.verdicts
    )
    assert verdicts != RIGHT.verdicts
    return replace(RIGHT, verdicts=verdicts)


class Page(HTMLParser):
    """What a page holds: its tables' rows of cells, each with its class, title and text."""

    _VOID = ("meta", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: list[dict[str, str]] = []
        self.outside: list[str] = []
        self._open: list[str] = []
        self._row = ""
        self.feed(html)
        self.close()
        assert self._open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.outside += [found[name] for name in ("src", "href") if name in found]
        if tag not in self._VOID:
            self._open.append(tag)
        if tag in ("th", "td", "div"):
            self.cells.append({"class": "", "title": "", "text": "", "row": self._row} | found)
        if tag == "tr":
            self._row = ""

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("th", "td", "div"):
            self.cells[-1]["text"] += data
            if self.cells[-1].get("scope") == "row":
                self._row = self.cells[-1]["text"]

    def titled(self, name: str) -> list[dict[str, str]]:
        return [cell for cell in self.cells if name in cell["title"]]


def page_of(report: VerificationReport) -> Page:
    return Page(verification_page(report.as_json()))


def test_the_page_needs_no_other_file() -> None:
    html = verification_page(RIGHT.as_json())
    assert Page(html).outside == []
    assert not any(word in html for word in ("http:", "https:", "url(", "@import", "<script"))


def test_every_weight_is_once_in_each_map_at_its_layer() -> None:
    page = page_of(RIGHT)
    for name in (f"decoder.layers.{n}.{QKV}.weight" for n in range(3)):
        cells = page.titled(name)
        assert [cell["row"] for cell in cells] == [f"layer {name.split('.')[2]}"] * 2
        assert all(cell["class"] == "l2" and cell["text"] == "-2.0" for cell in cells)
        assert all(name.replace("weight", "bias") in cell["title"] for cell in cells)
    rows = list(dict.fromkeys(cell["row"] for cell in page.cells if cell["title"]))
    assert rows == ["embedding", "layer 0", "layer 1", "layer 2", "final_layernorm", "output_layer"]


def test_what_is_off_is_framed_where_it_is_and_nothing_else_is() -> None:
    name = f"decoder.layers.1.{QKV}.weight"
    page = page_of(with_error("gradient", name, 1e-2, ratio=1.01))
    (framed,) = (cell for cell in page.cells if cell["title"] and "off" in cell["class"])
    assert (framed["row"], framed["text"], framed["class"]) == ("layer 1", "+3.0", "l7 off")
    assert framed["title"].startswith(f"{name}: error 0.01, tolerance 1e-05, norm ratio 1.01\n"), (
        "the worst of a cell comes first"
    )


def test_a_cell_of_many_experts_shows_the_worst_and_counts_the_rest() -> None:
    name = "decoder.layers.2.mlp.experts.experts.37.linear_fc1.weight"
    (cell, _) = page_of(with_error("gradient", name, 1e-4)).titled("linear_fc1")
    first, *_, last = cell["title"].splitlines()
    assert first.startswith(name) and last == "… and 28 that are nearer"
    assert cell["text"] == "+1.0"


def test_what_is_off_comes_before_what_agrees() -> None:
    name = "decoder.final_layernorm.weight"
    html = verification_page(with_error("weight", name, math.nan).as_json())
    body = html.partition("<body>")[2]
    assert body.index("What is off") < body.index(f"<td>{name}</td>") < body.index("compared")
    assert "differs from" in body and "agrees with" not in body
    assert "nan" in body and f"{len(RIGHT.verdicts) - 1} comparisons that agree" in body
    assert "What is off" not in verification_page(RIGHT.as_json())


def test_the_losses_of_both_are_told_step_by_step() -> None:
    texts = [c["text"] for c in page_of(replace(RIGHT, losses=((4.5, 4.5), (4.25, 4.5)))).cells]
    at = texts.index("4.25")
    assert texts[at - 1 : at + 3] == ["2", "4.25", "4.5", "0.25"]


def test_what_names_and_notes_hold_is_text_and_not_html() -> None:
    report = replace(
        RIGHT, recipe="<b>", hints=("a < b",), verdicts=(verdict("copies", "<i>", note="1 & 2"),)
    )
    html = verification_page(report.as_json())
    assert "&lt;i&gt;<small>1 &amp; 2</small>" in html and "<li>a &lt; b</li>" in html
    assert "<i>" not in html and "<title>&lt;b&gt; on 4 ranks</title>" in html


def test_numbers_that_json_has_no_form_for_are_text_and_the_page_shows_them() -> None:
    report = with_error("gradient", WEIGHTS[-1], math.nan, ratio=math.inf)
    report = replace(report, losses=((4.5, math.nan),))
    answer = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert (answer["first"]["error"], answer["first"]["ratio"]) == ("nan", "inf")
    (cell, _) = Page(verification_page(answer)).titled(WEIGHTS[-1])
    assert (cell["class"], cell["text"]) == ("l8 off", "∞")
    assert "error nan" in cell["title"] and "norm ratio inf" in cell["title"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embedding.word_embeddings.weight", ("embedding", "word_embeddings")),
        ("decoder.layers.12.input_layernorm.bias", ("layer 12", "input_layernorm")),
        (f"decoder.layers.0.{QKV}.layer_norm_weight", ("layer 0", "linear_qkv.layer_norm")),
        ("decoder.layers.0.mlp.router.weight", ("layer 0", "router")),
        ("decoder.layers.0.mlp.experts.3.linear_fc1.weight", ("layer 0", "experts linear_fc1")),
        (
            "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight",
            ("layer 0", "experts linear_fc1"),
        ),
        (
            "decoder.layers.0.mlp.shared_experts.linear_fc2.weight",
            ("layer 0", "shared_experts linear_fc2"),
        ),
        (f"mtp.layers.0.transformer_layer.{QKV}.weight", ("mtp 0", "linear_qkv")),
        ("decoder.layers.3", ("layer 3", "output")),
        ("decoder.layers.3.mlp", ("layer 3", "mlp")),
        ("decoder.final_layernorm", ("final_layernorm", "")),
        ("output_layer.weight", ("output_layer", "")),
    ],
)
def test_each_tensor_has_a_row_and_a_column(name: str, expected: tuple[str, str]) -> None:
    assert place(name) == expected


@pytest.mark.parametrize(
    ("error", "tolerance", "strained", "colour", "text"),
    [
        (0.0, 0.0, 0.0, 0, "="),
        (1e-7, 1e-5, 1e-2, 2, "-2.0"),
        (1e-5, 1e-5, 1.0, 4, "+0.0"),
        (1.1e-5, 1e-5, 1.1, 5, "+0.0"),
        (1.0, 1e-5, 1e5, 8, "+5.0"),
        (1e-9, 0.0, math.inf, 8, "∞"),
        ("nan", 1e-5, math.inf, 8, "∞"),
    ],
)
def test_colours_turn_where_rounding_ends(
    error: Any, tolerance: float, strained: float, colour: int, text: str
) -> None:
    found = strain({"error": error, "tolerance": tolerance})
    assert found == pytest.approx(strained)
    assert (level(found), short(found)) == (colour, text)
    assert (colour > LEVELS.index(0)) == (found > 1)


def test_every_level_has_a_colour_of_its_own() -> None:
    assert len(set(COLOURS)) == len(COLOURS) == len(LEVELS) + 1
