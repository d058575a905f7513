"""What the verifier found: a verdict on every number, the first that is off, and what it may be."""

from __future__ import annotations

import importlib.metadata
import math
from dataclasses import dataclass
from typing import Any

from mcore_lab.errors import LabError
from mcore_lab.layout.words import in_words
from mcore_lab.verify.compare import Verdict


class LayoutDiffersError(LabError):
    """A layout does not compute what one rank computes."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """A layout against one rank."""

    recipe: str
    layout: dict[str, Any]
    """The sizes by their short names; those of 1 left out."""
    world_size: int
    precision: str
    steps: int
    verdicts: tuple[Verdict, ...]
    """In the order in which a step computes what they judge."""
    losses: tuple[tuple[float, float], ...] = ()
    """Of each step, the mean loss on one rank and on the layout."""
    hints: tuple[str, ...] = ()
    """Known errors that leave such traces."""

    @property
    def passed(self) -> bool:
        """Whether the layout computes what one rank computes."""
        return all(verdict.passed for verdict in self.verdicts)

    @property
    def off(self) -> list[Verdict]:
        """Return what rounding does not explain, the first first."""
        return [verdict for verdict in self.verdicts if not verdict.passed]

    @property
    def first(self) -> Verdict | None:
        """Return what is off and was computed first: where to look."""
        return next(iter(self.off), None)

    @property
    def worst(self) -> dict[str, Verdict]:
        """Return the verdict nearest to its tolerance, or furthest beyond it, of each kind."""
        worst: dict[str, Verdict] = {}
        for verdict in self.verdicts:
            kind = verdict.kind
            if kind not in worst or _strain(verdict) > _strain(worst[kind]):
                worst[kind] = verdict
        return worst

    def require(self) -> None:
        """Raise LayoutDiffersError, with the first number that is off, unless all agree."""
        if self.first:
            raise LayoutDiffersError("\n".join([self.conclusion, *self.hints]))

    @property
    def layout_words(self) -> str:
        """Return the layout as a person writes it: `tp2 sp dp4`."""
        return in_words(self.layout) or "one rank"

    @property
    def conclusion(self) -> str:
        """Say in a line what was found."""
        ranks = f"{self.world_size} rank{'s' * (self.world_size > 1)}"
        what = f"{self.recipe} on {ranks} ({self.layout_words})"
        if self.first is None:
            return f"{what} computes what one rank computes: {len(self.verdicts)} comparisons"
        off = len(self.off)
        return f"{what} is wrong: first {self.first}; {off} of {len(self.verdicts)} are off"

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values; numbers that are not finite become text."""
        return {
            "recipe": self.recipe,
            "layout": self.layout,
            "world_size": self.world_size,
            "precision": self.precision,
            "steps": self.steps,
            "megatron_core": importlib.metadata.version("megatron-core"),
            "torch": importlib.metadata.version("torch"),
            "passed": self.passed,
            "conclusion": self.conclusion,
            "first": _plain(self.first) if self.first else None,
            "hints": list(self.hints),
            "losses": [list(map(_finite, pair)) for pair in self.losses],
            "kinds": [self._summary(kind, worst) for kind, worst in self.worst.items()],
            "verdicts": [_plain(verdict) for verdict in self.verdicts],
        }

    def _summary(self, kind: str, worst: Verdict) -> dict[str, Any]:
        of_kind = [verdict for verdict in self.verdicts if verdict.kind == kind]
        off = sum(not verdict.passed for verdict in of_kind)
        return {"kind": kind, "comparisons": len(of_kind), "off": off, "worst": _plain(worst)}


def _plain(verdict: Verdict) -> dict[str, Any]:
    return {
        "kind": verdict.kind,
        "name": verdict.name,
        "error": _finite(verdict.error),
        "tolerance": verdict.tolerance,
        "ratio": None if verdict.ratio is None else _finite(verdict.ratio),
        "passed": verdict.passed,
        "note": verdict.note,
    }


def _finite(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def _strain(verdict: Verdict) -> float:
    if math.isnan(verdict.error):
        return math.inf
    return verdict.error / verdict.tolerance if verdict.tolerance else verdict.error
