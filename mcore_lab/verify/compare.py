"""Two snapshots side by side: a verdict on every number, in the order of their computation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mcore_lab.verify.order import forward_place
from mcore_lab.verify.snapshot import Snapshot, Tensors
from mcore_lab.verify.tolerance import Tolerances

_NEGLIGIBLE = 1e-6
"""A tensor smaller than this share of all of them together is measured against that share."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One comparison of the candidate with the reference."""

    kind: str
    """What is compared: activation, loss, gradient, grad norm, learning rate, weight, moment, …"""
    name: str
    error: float
    """Largest relative difference; NaN where the candidate has no number, or not a finite one."""
    tolerance: float
    ratio: float | None = None
    """Norm of the candidate's by that of the reference's."""
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether rounding explains the difference."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f", norm {self.ratio:.6g} times the reference's"
        note = f" ({self.note})" if self.note else ""
        return f"{self.kind} {self.name}: off by {self.error:.1e}{ratio}{note}"


def compare(reference: Snapshot, candidate: Snapshot, allowed: Tolerances) -> list[Verdict]:
    """Return a verdict on every number, in the order in which a step computes them.

    What comes first and is off is where to look: activations in forward order, the loss, gradients
    from the last layer to the first; then what became of them.
    """
    return [
        *_tensors("initial weight", reference.initial_weights, candidate.initial_weights, 0.0),
        *_tensors("activation", reference.activations, candidate.activations, allowed.activation),
        *_copies("", reference.activations, candidate, allowed.activation),
        *_steps(reference, candidate, allowed),
        *_moments(reference, candidate, allowed),
        *_weights(reference, candidate, allowed),
        *_copies("weight ", reference.weights, candidate, allowed.gradient),
        *_copies("", _without_a_place(reference, candidate), candidate, allowed.gradient),
    ]


def _steps(reference: Snapshot, candidate: Snapshot, allowed: Tolerances) -> Iterator[Verdict]:
    for step in range(len(reference.losses)):
        yield from _losses(reference, candidate, allowed, step)
        if step == 0:
            yield from _auxiliary(reference, candidate, allowed)
            yield from _gradients(reference, candidate, allowed)
        for kind, of_steps, tolerance in (
            ("grad norm", "grad_norms", allowed.gradient),
            ("learning rate", "learning_rates", 1e-12),
        ):
            expected, there = getattr(reference, of_steps), getattr(candidate, of_steps)
            place = slice(step, step + 1)
            yield from _numbers(
                kind, expected[place], there[place], tolerance, names=[f"step {step + 1}"]
            )


def _tensors(
    kind: str, reference: Tensors, candidate: Tensors, tolerance: float
) -> Iterator[Verdict]:
    names = list(reference)
    if kind != "activation":
        names.sort(key=forward_place)
    floor = _NEGLIGIBLE * float(sum(t.double().square().sum() for t in reference.values())) ** 0.5
    for name in names:
        if name not in candidate:
            yield _missing(kind, name, tolerance)
            continue
        error, ratio = _difference(reference[name], candidate[name], floor)
        yield Verdict(kind=kind, name=name, error=error, tolerance=tolerance, ratio=ratio)


def _missing(kind: str, name: str, tolerance: float) -> Verdict:
    return Verdict(kind=kind, name=name, error=torch.nan, tolerance=tolerance, note="not there")


def _difference(
    reference: torch.Tensor, candidate: torch.Tensor, floor: float
) -> tuple[float, float | None]:
    """Return the norm of the difference by the reference's, and the ratio of their norms."""
    if reference.shape != candidate.shape:
        return torch.nan, None
    one, other = reference.double(), candidate.double()
    norm, apart = float(one.norm()), float((other - one).norm())
    ratio = float(other.norm()) / norm if norm else None
    scale = max(norm, floor)
    return (apart / scale if scale else apart), ratio


def _gradients(reference: Snapshot, candidate: Snapshot, allowed: Tolerances) -> list[Verdict]:
    """Judge gradients and copies of them together: a layer's before those of the layers below."""
    of, tolerance = "gradient of ", allowed.gradient
    verdicts = [
        *_copies(of, reference.gradients, candidate, tolerance),
        *_tensors("gradient", reference.gradients, candidate.gradients, tolerance),
    ]
    # Sorting keeps the order of equals, so that copies come before what one of them is.
    verdicts.sort(key=lambda verdict: forward_place(verdict.name.removeprefix(of)), reverse=True)
    return verdicts


def _copies(
    of: str, names: Iterable[str], candidate: Snapshot, tolerance: float
) -> Iterator[Verdict]:
    """Judge what several ranks hold and should hold alike."""
    for name in names:
        spread, where = candidate.torn.get(of + name, (0.0, ""))
        if spread > 0:
            note = f"ranks {where} hold different copies"
            yield Verdict(
                kind="copies", name=of + name, error=spread, tolerance=tolerance, note=note
            )


def _without_a_place(reference: Snapshot, candidate: Snapshot) -> list[str]:
    """Return what ranks hold differently and the reference does not know by that name."""
    placed = {
        *reference.activations,
        *(f"gradient of {name}" for name in reference.gradients),
        *(f"weight {name}" for name in reference.weights),
    }
    return [name for name in candidate.torn if name not in placed]


def _losses(
    reference: Snapshot, candidate: Snapshot, allowed: Tolerances, step: int
) -> Iterator[Verdict]:
    expected = reference.losses[step]
    there = candidate.losses[step] if step < len(candidate.losses) else []
    names = [f"step {step + 1}, micro-batch {n + 1}" for n in range(len(expected))]
    yield from _numbers("loss", expected, there, allowed.loss_of(step), names=names)


def _auxiliary(reference: Snapshot, candidate: Snapshot, allowed: Tolerances) -> Iterator[Verdict]:
    for kind, values in reference.auxiliary_losses.items():
        there = candidate.auxiliary_losses.get(kind, [])
        names = [f"{kind} of layer {layer}" for layer in range(len(values))]
        yield from _numbers("auxiliary loss", values, there, allowed.gradient, names=names)


def _numbers(
    kind: str,
    reference: list[float],
    candidate: list[float],
    tolerance: float,
    *,
    names: list[str],
) -> Iterator[Verdict]:
    for place, (name, expected) in enumerate(zip(names, reference, strict=True)):
        got = candidate[place] if place < len(candidate) else torch.nan
        error = abs(got - expected) / abs(expected) if expected else abs(got)
        ratio = got / expected if expected else None
        yield Verdict(kind=kind, name=name, error=error, tolerance=tolerance, ratio=ratio)


def _moments(reference: Snapshot, candidate: Snapshot, allowed: Tolerances) -> Iterator[Verdict]:
    for moment in ("exp_avg", "exp_avg_sq"):
        mine, theirs = (_of_moment(one, moment) for one in (reference, candidate))
        yield from _tensors(f"moment {moment}", mine, theirs, allowed.moment)


def _of_moment(snapshot: Snapshot, moment: str) -> Tensors:
    prefix = f"{moment}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in snapshot.moments.items()
        if name.startswith(prefix)
    }


def _weights(reference: Snapshot, candidate: Snapshot, allowed: Tolerances) -> Iterator[Verdict]:
    squares = _of_moment(reference, "exp_avg_sq")
    roots = {name: square.double().sqrt() for name, square in squares.items()}
    for name in sorted(reference.weights, key=forward_place):
        start, end = reference.initial_weights[name], reference.weights[name]
        there = candidate.weights.get(name)
        if there is None or there.shape != end.shape:
            yield _missing("weight", name, allowed.update)
            continue
        counts, noisy = _signal([reference.gradients.get(name), roots.get(name)], allowed.noise)
        moved, apart = (end - start).double() * counts, (there - end).double() * counts
        norm = float(moved.norm())
        error = float(apart.norm()) / norm if norm else float(apart.norm())
        ratio = float((there - start).double().mul(counts).norm()) / norm if norm else None
        note = f"{noisy} elements left out: their gradient is rounding noise" if noisy else ""
        yield Verdict(
            kind="weight", name=name, error=error, tolerance=allowed.update, ratio=ratio, note=note
        )


def _signal(sizes: Sequence[torch.Tensor | None], noise: float) -> tuple[torch.Tensor, int]:
    """Return 1 for each element whose gradients are above noise, and how many are not.

    They must be so in the first step, when Adam makes all of them the same size, and on the whole.
    """
    counts = torch.ones((), dtype=torch.bool)
    for size in sizes:
        if size is not None:
            size = size.double().abs()
            counts = counts & (size > noise * float(size.square().mean().sqrt()))
    return counts.double(), int((~counts).sum())
