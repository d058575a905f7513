"""The order of a sequence over ranks is Megatron-Core's, and its tiles are the mask, once each."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from cp_cases import Case
from fake_ranks import parallel_state, rank_of_world
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_lab.backends.context_parallel import Documents, zigzag_places
from mcore_lab.errors import LayoutError


@pytest.mark.parametrize(("rank", "size"), [(0, 2), (1, 2), (0, 4), (2, 4), (3, 4)])
def test_a_rank_holds_the_tokens_that_megatron_core_gives_it(rank: int, size: int) -> None:
    from megatron.core.utils import get_batch_on_this_cp_rank

    tokens = torch.arange(48).view(1, 48)
    with rank_of_world(rank, size):
        parallel_state.initialize_model_parallel(
            context_parallel_size=size, create_gloo_process_groups=False
        )
        options = {"cp_group": parallel_state.get_context_parallel_group()}
        if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters:
            options["is_hybrid_cp"] = False
        batch = get_batch_on_this_cp_rank({"tokens": tokens}, **options)
    assert batch["tokens"][0].equal(zigzag_places([48], rank, size))


def test_each_document_of_a_packed_sequence_is_in_zigzag_order_on_its_own() -> None:
    assert zigzag_places([4, 8], 0, 2).tolist() == [0, 3, 4, 5, 10, 11]
    assert zigzag_places([4, 8], 1, 2).tolist() == [1, 2, 6, 7, 8, 9]


def test_a_length_that_cannot_be_cut_is_refused_with_one_that_can() -> None:
    with pytest.raises(LayoutError, match=r"2·4 = 8 chunks, which lengths \[12, 30\].*\[16, 32\]"):
        zigzag_places([12, 16, 30], 0, 4)


@st.composite
def _documents(draw: st.DrawFn) -> tuple[int, Case]:
    size = draw(st.sampled_from([1, 2, 3, 4]))
    multiple = 2 * size if size > 1 else 1
    stored = [n * multiple for n in draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))]
    lengths = [draw(st.integers(1, n)) for n in stored]
    causal = draw(st.booleans())
    return size, Case(stored=tuple(stored), lengths=tuple(lengths), causal=causal)


@given(_documents())
@settings(max_examples=100, deadline=None)
def test_every_pair_that_the_mask_shows_is_in_one_tile_and_no_other_is(
    drawn: tuple[int, Case],
) -> None:
    size, case = drawn
    assert case.lengths is not None
    documents = Documents(
        ranks=size,
        tokens=sum(case.stored) // size,
        stored=tuple(n // size for n in case.stored),
        lengths=case.lengths,
    )
    seen = torch.zeros(sum(case.stored), sum(case.stored), dtype=torch.int)
    everyone = range(size)
    places = torch.cat([zigzag_places(case.stored, rank, size) for rank in everyone])
    for tile in documents.tiles(everyone, everyone, causal=case.causal):
        queries, keys = places[tile.queries], places[tile.keys]
        pairs = torch.ones(len(queries), len(keys), dtype=torch.int)
        seen[queries[:, None], keys] += pairs.tril() if tile.causal else pairs
    shown = ~case.hidden() & case.is_text[:, None]
    assert seen.equal(shown.int())


@pytest.mark.parametrize("size", [2, 4, 8])
def test_every_rank_has_the_same_work_under_a_causal_mask(size: int) -> None:
    documents = Documents.one_sequence(64, size)

    def scores(rank: int, source: int) -> int:
        tiles = documents.tiles([rank], [source], causal=True)
        return sum(len(range(64)[t.queries]) * len(range(64)[t.keys]) for t in tiles)

    # Of its own block a rank computes the square, whose upper half the kernel skips.
    assert {scores(r, s) for r, s in itertools.permutations(range(size), 2)} == {64 * 64 // 2}
    assert {scores(r, r) for r in range(size)} == {64 * 64}
