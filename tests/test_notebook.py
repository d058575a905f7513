"""The notebook that tours the project, executed as a person would from a fresh kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path(__file__).parents[1] / "recipes" / "tour.ipynb"
SECONDS = 240


@pytest.fixture(scope="module")
def cells() -> list[Any]:
    """The tour's code cells, executed in a kernel of this Python."""
    notebook = nbformat.read(TOUR, as_version=4)  # type: ignore[no-untyped-call]
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3").execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_tour_shows_the_grid_the_curves_and_the_timeline(cells: list[Any]) -> None:
    shown = [kind for cell in cells for output in cell.outputs for kind in output.get("data", ())]
    assert shown.count("image/svg+xml") == 2
    assert shown.count("image/png") == 1


def test_the_runs_of_the_tour_agree_and_its_layout_is_proved(cells: list[Any]) -> None:
    (losses,) = [
        output.data["text/plain"]
        for cell in cells
        for output in cell.outputs
        if set(output.get("data", ())) == {"text/plain"}
    ]
    alone, split = map(float, losses.strip("()").split(","))
    assert split == pytest.approx(alone, rel=1e-5)
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert "computes what one rank computes" in printed
    assert "error:" not in printed


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(TOUR, as_version=4)  # type: ignore[no-untyped-call]
    assert not any(cell.get("outputs") for cell in notebook.cells)
