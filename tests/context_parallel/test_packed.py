"""Documents packed one after the other never see each other, on one rank and over several."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from cp_cases import Case, assert_close, context_parallel_ranks, cumulative
from cp_module import core_attention, packed_params
from on_ranks import on_ranks

from mcore_lab.backends.context_parallel import zigzag_places
from mcore_lab.backends.context_parallel.packed import packed_documents
from mcore_lab.errors import LayoutError

PACKED = [
    Case(stored=(16, 8, 0, 32, 8), heads=8, groups=4),
    Case(stored=(16, 8, 32, 8), lengths=(13, 8, 20, 1)),
    Case(stored=(8, 32), lengths=(2, 30), heads=8, groups=2, value_channels=4),
    Case(stored=(16, 48), lengths=(9, 48), heads=8, dtype=torch.bfloat16),
]
"""Documents of different lengths, with and without padding, empty or shorter than a chunk."""
UNEVEN = [Case(stored=(1, 7, 12, 5), heads=8, groups=2), Case(stored=(3,), heads=1, groups=1)]
"""What only one rank takes: any length."""


def check(case: Case, size: int, comm_type: str | None) -> None:
    """Hold this rank's documents to those of one rank, each attended to alone."""
    rank = dist.get_rank()
    places = zigzag_places(case.stored, rank, size)
    query, key, value, grad = (x[places].squeeze(1) for x in case.inputs())
    inputs = [x.requires_grad_() for x in (query, key, value)]
    attention = core_attention(case, size, comm_type)
    output = attention(*inputs, None, packed_seq_params=packed_params(case))
    assert output.shape == (len(places), case.heads * case.value_channels)
    got = output.detach().view_as(grad), *torch.autograd.grad(output, inputs, grad.flatten(1))
    for name, of_rank, of_all in zip(
        ("output", "dq", "dk", "dv"), got, case.expected(), strict=True
    ):
        expected = of_all[places].squeeze(1)
        assert_close(f"{name} of {case}, {comm_type}, rank {rank}", of_rank, expected)
        padding = ~case.is_text[places]
        assert not of_rank[padding].any(), f"{name} of padding is not zero"


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@on_ranks(1)
def test_one_rank_keeps_documents_apart(causal: bool) -> None:
    with context_parallel_ranks(1):
        for case in PACKED + UNEVEN:
            check(replace(case, causal=causal), 1, None)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("comm_type", ["p2p", "all_gather", "a2a"])
@on_ranks(2)
def test_two_ranks_keep_documents_apart(comm_type: str, causal: bool) -> None:
    with context_parallel_ranks(2):
        for case in PACKED:
            check(replace(case, causal=causal), 2, comm_type)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("comm_type", ["p2p", "all_gather", "a2a", "a2a+p2p"])
@on_ranks(4)
def test_four_ranks_keep_documents_apart(comm_type: str, causal: bool) -> None:
    with context_parallel_ranks(4, hierarchy=[2, 2] if comm_type == "a2a+p2p" else None):
        for case in PACKED:
            check(replace(case, causal=causal), 4, comm_type)


@on_ranks(2)
def test_another_document_changes_nothing_bit_for_bit() -> None:
    case = Case(stored=(8, 16))
    with context_parallel_ranks(2):
        attention = core_attention(case, 2)
        places = zigzag_places(case.stored, dist.get_rank(), 2)
        query, key, value, _ = (x[places].squeeze(1) for x in case.inputs())
        before = attention(query, key, value, None, packed_seq_params=packed_params(case))
        for x in (query, key, value):
            x[4:] *= 100
        after = attention(query, key, value, None, packed_seq_params=packed_params(case))
        assert before[:4].equal(after[:4])
        assert not before[4:].equal(after[4:])


@on_ranks(2)
def test_tokens_behind_the_last_document_are_left_alone() -> None:
    case = Case(stored=(8, 16))
    with context_parallel_ranks(2):
        places = zigzag_places([8, 16, 8], dist.get_rank(), 2)
        query, key, value, grad = Case(stored=(8, 16, 8)).inputs()
        inputs = [x[places].squeeze(1).requires_grad_() for x in (query, key, value)]
        output = core_attention(case, 2, "a2a")(
            *inputs, None, packed_seq_params=packed_params(case)
        )
        assert output[:12].any()
        grads = torch.autograd.grad(output, inputs, grad[places].flatten(1))
        assert not any(x[12:].any() for x in (output, *grads))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cu_seqlens_q": None, "cu_seqlens_kv": None}, "need cu_seqlens_q"),
        ({"cu_seqlens_kv": cumulative([4, 20])}, "of the same documents"),
        (dict.fromkeys(("cu_seqlens_q", "cu_seqlens_kv"), cumulative([8, 32])), "ends at 40"),
        (dict.fromkeys(("cu_seqlens_q", "cu_seqlens_kv"), cumulative([8, 10])), r"\[10\].*\[12\]"),
        (dict.fromkeys(("cu_seqlens_q", "cu_seqlens_kv"), cumulative([8, -4])), "rise"),
        (
            dict.fromkeys(("cu_seqlens_q_padded", "cu_seqlens_kv_padded"), cumulative([4, 16])),
            r"\[8, 16\] tokens, which those of \[4, 16\]",
        ),
        ({"local_cp_size": 1}, "needs Transformer Engine"),
    ],
)
def test_documents_that_cannot_be_are_refused(change: dict[str, object], words: str) -> None:
    packed = packed_params(Case(stored=(8, 16)))
    for name, value in change.items():
        setattr(packed, name, value)
    with pytest.raises(LayoutError, match=words):
        packed_documents(packed, 12, 2)
