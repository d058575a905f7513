"""`mcore-lab compare`: from which step on two runs differ."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mcore_lab.cli.arguments import Parser, require_plottable
from mcore_lab.cli.runs import run_in
from mcore_lab.config import read_toml
from mcore_lab.errors import ConfigError, RunFolderError
from mcore_lab.report.divergence import QUANTITIES, Curve, Divergence, differing_keys, divergence
from mcore_lab.report.tables import print_json, print_table
from mcore_lab.training import RunFolder

_WORDS = {"loss": "loss", "grad_norm": "grad norm"}
_MOST_KEYS = 8
"""Differing settings that are listed."""
_HINT = (
    "they differ from their first step on, so they began with other weights or other samples; a "
    "common checkpoint (--checkpoint.load) gives both the same weights"
)


def main(argv: Sequence[str]) -> int:
    """Print how far two runs are apart at every step; return 0 if within tolerance, else 1."""
    options = _options(argv)
    runs = options.RUN_A, options.RUN_B
    folders = run_in(runs[0]), run_in(runs[1])
    found = _compared(folders, options.tolerance)
    keys = differing_keys(*(read_toml(folder.path / "recipe.toml") for folder in folders))
    if options.json:
        print_json(_as_json(runs, found, keys, options.tolerance))
    else:
        _tell(runs, found, keys)
    if options.plot:
        _plot(options.plot, found, runs)
    return 0 if found.agrees else 1


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="mcore-lab compare", description=main.__doc__)
    for name in ("RUN_A", "RUN_B"):
        parser.add_argument(name, type=Path, help="the folder of a run")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help="largest relative difference of losses and gradient norms (default: 1e-5)",
    )
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw both into an SVG or PNG")
    parser.add_argument("--json", action="store_true", help="print every step as JSON")
    options = parser.parse_args(argv)
    if not options.tolerance >= 0:
        raise ConfigError(f"--tolerance expects 0 or more; got {options.tolerance:g}")
    require_plottable("--plot", options.plot)
    return options


def _compared(folders: tuple[RunFolder, RunFolder], tolerance: float) -> Divergence:
    """Compare the runs, or raise RunFolderError with what keeps them from it."""
    one, other = (_metrics(folder) for folder in folders)
    found = divergence(one, other, tolerance)
    if not found.steps:
        ran = " and ".join(
            f"{folder.path} has {_spans(alone)}"
            for folder, alone in zip(folders, found.alone, strict=True)
        )
        raise RunFolderError(f"the runs have no step in common: {ran}")
    return found


def _metrics(folder: RunFolder) -> list[dict[str, Any]]:
    lines = folder.metrics()
    if not lines:
        raise RunFolderError(f"no step is recorded in {folder.path}")
    for number, line in enumerate(lines, start=1):
        for name in ("step", *QUANTITIES):
            if not isinstance(line, dict) or not isinstance(line.get(name), int | float):
                raise RunFolderError(
                    f"{folder.path / 'metrics.jsonl'} is not of a run: line {number} has no number "
                    f"for {name}"
                )
    return lines


def _tell(runs: Sequence[Path], found: Divergence, keys: Mapping[str, Any]) -> None:
    if keys:
        print(f"the recipes differ in more than their layout: {_listed(keys)}\n")
    names = [name for c in found.curves for name in (f"{_WORDS[c.name]} A", "B", "difference")]
    print_table(("step", *names), list(_rows(found)))
    print(f"\nA is {runs[0]}, B is {runs[1]}")
    for run, alone in zip(runs, found.alone, strict=True):
        if alone:
            print(f"only {run} has {_spans(alone)}")
    for curve in found.curves:
        print(_verdict(curve))
    if found.curves[0].first_beyond == found.steps[0]:
        print(f"hint: {_HINT}")


def _rows(found: Divergence) -> Iterator[tuple[str, ...]]:
    last = -1
    for place in found.telling_places():
        if place != last + 1:
            yield ("…",) * (1 + 3 * len(found.curves))
        last = place
        cells = (cell for curve in found.curves for cell in _cells(curve, place))
        yield (str(found.steps[place]), *cells)


def _cells(curve: Curve, place: int) -> tuple[str, ...]:
    one, other = (values[place] for values in curve.values)
    mark = " <- first" if curve.steps[place] == curve.first_beyond else ""
    return f"{one:.7g}", f"{other:.7g}", f"{curve.differences[place]:.1e}{mark}"


def _verdict(curve: Curve) -> str:
    step, apart = curve.largest
    largest = f"largest relative difference {apart:.1e}, at step {step}"
    if curve.first_beyond is None:
        said = f"within {curve.tolerance:g} at every step"
    else:
        said = f"beyond {curve.tolerance:g}, first at step {curve.first_beyond}"
    return f"{_WORDS[curve.name]}: {said}; {largest}"


def _listed(keys: Mapping[str, Any]) -> str:
    """Return the settings that differ, with both values, and how many more there are."""
    said = [f"{key} {_value(one)} and {_value(other)}" for key, (one, other) in keys.items()]
    more = len(said) - _MOST_KEYS
    return ", ".join(said[:_MOST_KEYS]) + (f" and {more} more" if more > 0 else "")


def _value(value: Any) -> str:
    return "not set" if value is None else str(value)


def _spans(steps: Sequence[int]) -> str:
    """Return steps as a person reads them: `steps 1-20`; nothing if there is none."""
    if not steps:
        return ""
    first, last = steps[0], steps[-1]
    if first == last:
        return f"step {first}"
    return f"steps {first}-{last}" if last - first + 1 == len(steps) else f"{len(steps)} steps"


def _as_json(
    runs: Sequence[Path], found: Divergence, keys: Mapping[str, Any], tolerance: float
) -> dict[str, Any]:
    return {
        "runs": list(map(str, runs)),
        "tolerance": tolerance,
        "agrees": found.agrees,
        "recipes_differ_in": {key: list(pair) for key, pair in keys.items()},
        "only_in": [_spans(alone) for alone in found.alone],
        "first_beyond": {curve.name: curve.first_beyond for curve in found.curves},
        "steps": [_step(found, place) for place in range(len(found.steps))],
    }


def _step(found: Divergence, place: int) -> dict[str, Any]:
    numbers: dict[str, Any] = {"step": found.steps[place]}
    for curve in found.curves:
        numbers[curve.name] = [values[place] for values in curve.values]
        numbers[f"{curve.name}_difference"] = curve.differences[place]
    return numbers


def _plot(file: Path, found: Divergence, runs: Sequence[Path]) -> None:
    from mcore_lab.report.divergence_plot import plot_divergence

    try:
        plot_divergence(file, found, list(map(str, runs)))
    except OSError as error:
        raise ConfigError(f"--plot {file}: {error.strerror}") from None
    print(f"written to {file}", file=sys.stderr)
