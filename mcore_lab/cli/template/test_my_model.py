"""What `my_model` computes does not depend on its layout.

Run it: `pytest test_my_model.py`.
"""

from __future__ import annotations

from mcore_lab.cli.template.my_model import RECIPE
from mcore_lab.verify import verify


def test_its_layout_computes_what_one_rank_computes() -> None:
    verify(RECIPE, RECIPE.layout, nproc=2, timeout=300).require()
