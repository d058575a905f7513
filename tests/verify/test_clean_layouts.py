"""No false alarm: layouts that are right are found to be, from the losses to Adam's moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from mcore_lab.layout import ParallelLayout
from mcore_lab.verify import Reference

ONE = ParallelLayout()
DISTOPT = replace(ONE, use_distributed_optimizer=True)
CLEAN = [
    ("dense", 2, ONE.resized(tp=2)),
    ("dense", 2, ONE.resized(tp=2, sp=True)),
    ("dense", 2, ONE.resized(cp=2)),
    ("dense", 2, ONE.resized(pp=2)),
    ("dense", 2, ONE.resized(pp=2, vpp=2)),
    ("dense", 2, DISTOPT),
    ("dense", 4, DISTOPT.resized(cp=2)),
    ("dense", 4, ONE.resized(tp=2, sp=True, pp=2)),
    ("bf16", 2, ONE.resized(tp=2, sp=True)),
    ("bf16", 2, ONE.resized(pp=2)),
    ("bf16", 2, DISTOPT),
    ("moe", 2, ONE.resized(ep=2)),
    ("moe", 2, ONE.resized(tp=2, sp=True, ep=2, etp=1)),
    ("moe", 2, ONE.resized(tp=2, sp=True, etp=1)),
    ("moe", 4, ONE.resized(tp=2, sp=True, ep=2, etp=2)),
    ("moe", 4, ONE.resized(cp=2, pp=2, ep=2)),
    ("mla", 2, ONE.resized(tp=2)),
    ("mla", 2, ONE.resized(tp=2, sp=True)),
    ("mla", 2, ONE.resized(cp=2)),
    ("mtp", 2, ONE.resized(tp=2, sp=True)),
    ("mtp", 2, DISTOPT),
]


def _name(of: object) -> str:
    from mcore_lab.layout.words import sizes_in_use

    model, ranks, layout = of  # type: ignore[misc]
    sizes = sizes_in_use(layout, ranks)
    return "-".join([model, *(name if on is True else f"{name}{on}" for name, on in sizes.items())])


@pytest.mark.parametrize("case", CLEAN, ids=_name)
def test_a_layout_that_is_right_passes(
    case: tuple[str, int, ParallelLayout], reference: Callable[[str], Reference]
) -> None:
    of, ranks, layout = case
    reference(of).verify(layout, ranks).require()


def test_what_a_rank_sends_of_each_layer_is_not_the_tensor_of_all_layers(
    reference: Callable[[str], Reference],
) -> None:
    """Pickled, a view takes the whole along: of ten layers, ten times the model."""
    weights = reference("dense").snapshot.weights
    assert any(".layers.3." in name for name in weights)
    for weight in weights.values():
        assert weight.untyped_storage().nbytes() == weight.nbytes
