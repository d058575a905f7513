"""What is said of a broken rule, and the search for the nearest values that keep it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mcore_lab.layout.parallel import ParallelLayout


@dataclass(frozen=True, kw_only=True)
class BrokenRule:
    """One rule that a layout breaks."""

    rule: str
    """What must hold."""
    numbers: str
    """The numbers for which it does not."""
    fix: str
    """The nearest values that work, as a person would set them."""

    def __str__(self) -> str:
        return f"{self.rule}: {self.numbers}; use {self.fix}"


class Amount(NamedTuple):
    """A number that a layout divides, and how a person sets it."""

    name: str
    value: int
    setting: str
    """`--model.num-layers {}`, with braces in the place of the value."""


def nearest_values(value: int, works: Callable[[int], bool], most: int) -> list[int]:
    """Return the values from 1 to `most` just below and just above `value` that work, if any."""
    below = next((n for n in range(min(value - 1, most), 0, -1) if works(n)), None)
    above = next((n for n in range(max(value + 1, 1), most + 1) if works(n)), None)
    return [n for n in (below, above) if n is not None]


def other_amounts(amount: Amount, works: Callable[[int], bool], most: int | None = None) -> str:
    """Return how to set `amount` to the nearest values that work, or nothing."""
    values = nearest_values(amount.value, works, most or amount.value + 2**16)
    return amount.setting.format(" or ".join(map(str, values))) if values else ""


def other_sizes(
    layout: ParallelLayout, names: Sequence[str], works: Callable[[ParallelLayout], bool]
) -> list[str]:
    """Return how to set each size, the others kept, to the nearest values with which it works.

    Sizes up to eight times as large are tried: a larger one is another machine, not a repair.
    """

    def settings(name: str) -> str:
        size = Amount(name, getattr(layout, name), f"--layout.{name} {{}}")
        return other_amounts(size, lambda n: works(layout.resized(**{name: n})), 8 * size.value)

    return [settings(name) for name in names]


def either(*fixes: str) -> str:
    """Join the fixes that exist."""
    return ", or ".join(fix for fix in fixes if fix)


def multiple_of(
    layout: ParallelLayout,
    amount: Amount,
    sizes: Sequence[str],
    *,
    factor: int = 1,
    works: Callable[[int, ParallelLayout], bool] | None = None,
    note: str = "",
) -> Iterator[BrokenRule]:
    """Hold that `amount` is a multiple of `factor` times the product of the layout's `sizes`.

    `works` says which values are offered, where they have to keep more than this rule.
    """

    def divides(value: int, of: ParallelLayout) -> bool:
        unit: int = factor * prod(getattr(of, name) for name in sizes)
        return value % unit == 0

    if divides(amount.value, layout):
        return
    fits = works or divides
    yield BrokenRule(
        rule=f"{amount.name} must be a multiple of {_product(factor, sizes)}{note}",
        numbers=f"{amount.name} {amount.value}, {_product_of_numbers(layout, factor, sizes)}",
        fix=either(
            *other_sizes(layout, sizes, lambda other: fits(amount.value, other)),
            other_amounts(amount, lambda n: fits(n, layout)),
        ),
    )


def _product(factor: int, terms: Sequence[object]) -> str:
    return " * ".join([str(factor)] * (factor > 1) + [str(term) for term in terms])


def _product_of_numbers(layout: ParallelLayout, factor: int, sizes: Sequence[str]) -> str:
    numbers = [getattr(layout, name) for name in sizes]
    if factor == 1 and len(sizes) == 1:
        return f"{sizes[0]} {numbers[0]}"
    return f"{_product(factor, sizes)} = {_product(factor, numbers)} = {factor * prod(numbers)}"
