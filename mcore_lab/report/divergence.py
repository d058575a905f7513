"""Two runs side by side: by how much they differ at every step, and from which step on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

QUANTITIES = ("loss", "grad_norm")
_SHORT = 24
"""Steps that are all shown."""
_AROUND = 3
"""Of a longer run, the steps shown at each end, and on both sides of where it diverges."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One quantity of two runs, at the steps that both have."""

    name: str
    steps: tuple[int, ...]
    values: tuple[tuple[float, ...], tuple[float, ...]]
    """Of the first run and of the second."""
    tolerance: float

    @cached_property
    def differences(self) -> tuple[float, ...]:
        """Return how far the second run is off at each step, relative to the first.

        NaN where either has no finite number; absolute where the first is 0.
        """
        pairs = zip(*self.values, strict=True)
        return tuple(abs(other - one) / (abs(one) or 1.0) for one, other in pairs)

    @property
    def first_beyond(self) -> int | None:
        """Return the first step at which the difference is beyond the tolerance."""
        pairs = zip(self.steps, self.differences, strict=True)
        return next((step for step, apart in pairs if not apart <= self.tolerance), None)

    @property
    def largest(self) -> tuple[int, float]:
        """Return the step of the largest difference, and the difference; NaN is larger than all."""
        pairs = zip(self.steps, self.differences, strict=True)
        return max(pairs, key=lambda pair: (pair[1] != pair[1], pair[1]))


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """What two runs measured, compared step by step."""

    curves: tuple[Curve, ...]
    """Of the loss and of the gradient norm."""
    alone: tuple[tuple[int, ...], tuple[int, ...]]
    """Steps that only one of the runs has: the first, the second."""

    @property
    def steps(self) -> tuple[int, ...]:
        """Return the steps that both runs have."""
        return self.curves[0].steps

    @property
    def agrees(self) -> bool:
        """Whether every quantity is within its tolerance at every step."""
        return all(curve.first_beyond is None for curve in self.curves)

    def telling_places(self) -> list[int]:
        """Return where in `steps` to look: all of a short run, else both ends and divergences."""
        count = len(self.steps)
        if count <= _SHORT:
            return list(range(count))
        found = {
            self.steps.index(c.first_beyond) for c in self.curves if c.first_beyond is not None
        }
        middles = [range(place - _AROUND, place + _AROUND + 1) for place in found]
        ends = [range(_AROUND), range(count - _AROUND, count)]
        return sorted({place for places in (*ends, *middles) for place in places} & {*range(count)})


def divergence(
    one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], tolerance: float
) -> Divergence:
    """Compare the lines of two runs' `metrics.jsonl`; they must have a step in common."""
    first, second = ({line["step"]: line for line in lines} for lines in (one, other))
    steps = tuple(sorted(first.keys() & second.keys()))
    return Divergence(
        curves=tuple(
            Curve(
                name=name,
                steps=steps,
                values=(_values(first, steps, name), _values(second, steps, name)),
                tolerance=tolerance,
            )
            for name in QUANTITIES
        ),
        alone=(_alone(first, second), _alone(second, first)),
    )


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings of two recipes that differ, by dotted name; their layouts may.

    They are TOML tables; what one does not have is None there.
    """
    first, second = dict(_flat(one)), dict(_flat(other))
    names = (name for name in {**first, **second} if not name.startswith("layout."))
    pairs = {name: (first.get(name), second.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _values(lines: Mapping[int, Any], steps: Sequence[int], name: str) -> tuple[float, ...]:
    return tuple(float(lines[step][name]) for step in steps)


def _alone(lines: Mapping[int, Any], others: Mapping[int, Any]) -> tuple[int, ...]:
    return tuple(sorted(lines.keys() - others.keys()))


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            # A recipe writes None as text where leaving it out would say something else.
            yield f"{prefix}{name}", None if value == "None" else value
