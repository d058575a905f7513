"""What a collective moves, and the bandwidths that follow, as NCCL-tests define them. No torch.

`S` is the larger of a rank's two buffers in bytes (what an all-gather leaves, what a reduce-scatter
takes, what the root of a scatter or of a gather has), `n` the ranks of a group, `t` the seconds:

    algorithm bandwidth = S / t
    bus bandwidth       = S / t * factor(n)

`S * factor(n)` is what the busiest rank has to send or to receive where the ranks do the sums, so
that the bus bandwidth is that of a rank's link, however many ranks there are.

Source: doc/PERFORMANCE.md of https://github.com/NVIDIA/nccl-tests; for scatter, gather and
send/recv, which it does not treat, `GetBw` in src/scatter.cu, src/gather.cu and src/sendrecv.cu.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction


def _of_a_ring(ranks: int) -> Fraction:
    """Each rank keeps an n-th, and passes on the rest."""
    return Fraction(ranks - 1, ranks)


def _of_both_halves(ranks: int) -> Fraction:
    """A reduce-scatter, and an all-gather after it."""
    return 2 * _of_a_ring(ranks)


def _of_all(ranks: int) -> Fraction:
    """All of it leaves one rank, or comes to one."""
    return Fraction(1)


BUS_FACTORS: dict[str, Callable[[int], Fraction]] = {
    "broadcast": _of_all,
    "scatter": _of_a_ring,
    "gather": _of_a_ring,
    "reduce": _of_all,
    "all-gather": _of_a_ring,
    "all-reduce": _of_both_halves,
    "reduce-scatter": _of_a_ring,
    "all-to-all": _of_a_ring,
    "send-recv": _of_all,
}
"""Of every collective that is measured, what its bus bandwidth is of its algorithm bandwidth."""


def bytes_per_rank(collective: str, ranks: int, size: int) -> int:
    """Return the bytes that the busiest rank sends, or receives, of a collective of `size` bytes.

    Whole if `size` is a multiple of `ranks`.
    """
    return int(size * BUS_FACTORS[collective](ranks))


def algorithm_bandwidth(size: int, seconds: float) -> float:
    """Return `S / t`, in bytes a second."""
    return size / seconds


def bus_bandwidth(collective: str, ranks: int, size: int, seconds: float) -> float:
    """Return `S / t * factor(n)`, in bytes a second."""
    return bytes_per_rank(collective, ranks, size) / seconds
