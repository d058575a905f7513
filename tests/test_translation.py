"""The README in Chinese: it has the commands, figures, links and parts of the English one."""

from __future__ import annotations

import re
from pathlib import Path

from pages import blocks_of

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
TEXTS = {page: page.read_text(encoding="utf-8") for page in (ENGLISH, CHINESE)}


def code(page: Path) -> list[str]:
    """Return the code of every block, without what its comments say."""
    blocks = [re.sub(r"\s+#.*", "", block.code) for block in blocks_of(page)]
    return [re.sub(r" +", " ", block) for block in blocks]


def figures(page: Path) -> list[list[list[str]]]:
    """Return the numbers of every cell of every row of the tables."""
    rows = re.findall(r"^\|(.*)\|$", TEXTS[page], re.MULTILINE)
    return [[re.findall(r"\d[\d.,e-]*", cell) for cell in row.split("|")] for row in rows]


def names(page: Path) -> list[str]:
    """Return all that is quoted as code in sentences and tables, sorted."""
    prose = re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL)
    return sorted(re.findall(r"`([^`]+)`", prose))


def links(page: Path) -> list[str]:
    """Return where links and pictures lead, but for those to the other language."""
    found = re.findall(r"\]\(([^)]+)\)", TEXTS[page])
    return sorted(target for target in found if not target.startswith("README"))


def test_each_leads_to_the_other() -> None:
    assert "](README.md)" in TEXTS[CHINESE]
    assert "](README.zh-CN.md)" in TEXTS[ENGLISH]


def test_both_have_the_same_parts() -> None:
    levels = [re.findall(r"^(#+) ", TEXTS[page], re.MULTILINE) for page in TEXTS]
    assert levels[0] == levels[1]


def test_both_have_the_same_commands_and_code() -> None:
    assert code(CHINESE) == code(ENGLISH)


def test_their_tables_have_the_same_figures() -> None:
    assert figures(CHINESE) == figures(ENGLISH)


def test_both_name_the_same_things_and_lead_to_the_same_pages() -> None:
    assert names(CHINESE) == names(ENGLISH)
    assert links(CHINESE) == links(ENGLISH)


def test_it_has_the_terms_of_the_field() -> None:
    for term in (
        "张量并行",
        "序列并行",
        "流水线",
        "上下文并行",
        "专家",
        "检查点",
        "微批次",
        "气泡",
    ):
        assert term in TEXTS[CHINESE]
