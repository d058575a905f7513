"""Every planted error is found, and what is named first is where it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from planted import ERRORS, planted

from mcore_lab.errors import LayoutError
from mcore_lab.layout import ParallelLayout
from mcore_lab.verify import Reference


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_found_where_it_is(name: str, reference: Callable[[str], Reference]) -> None:
    error = ERRORS[name]
    one_rank = reference(error.of)
    with planted(error):
        report = one_rank.verify(error.layout, error.ranks)
    assert not report.passed
    assert report.first is not None
    assert report.first.kind == error.kind
    assert report.first.name.startswith(error.name)
    if error.hint:
        assert any(error.hint in hint for hint in report.hints), report.hints


def test_experts_and_their_splits_do_not_multiply_the_world(
    reference: Callable[[str], Reference],
) -> None:
    layout = ParallelLayout().resized(tp=2, sp=True, ep=2, etp=2)
    with pytest.raises(LayoutError, match="ep and etp fold into the world"):
        reference("moe").verify(layout, 2)
