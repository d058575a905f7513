"""Every layout that the rules allow, each held against one rank; resumable, and kept as data."""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mcore_lab import cpu
from mcore_lab.config import Data, Model, Recipe, Training, recipe_to_toml
from mcore_lab.errors import LabError, RankFailedError, RunFolderError
from mcore_lab.layout import ParallelLayout
from mcore_lab.layout.words import in_words, sizes_in_use
from mcore_lab.runtime import choose_device
from mcore_lab.runtime.launch import end_with_parent
from mcore_lab.runtime.signals import sigterm_raises
from mcore_lab.verify import Reference
from mcore_lab.verify.layouts import allowed_layouts
from mcore_lab.verify.report import VerificationReport
from mcore_lab.verify.tolerance import Tolerances

STEPS = 2
"""Optimizer steps that are compared: the second is of the weights that the first left."""

_SECONDS = 120.0
"""What a layout may take: one that hangs is a failure, not a wait."""

_TRANSFORMER = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "add_bias_linear": False,
    # Wide enough for queries and keys to matter from the first step: at Megatron-Core's own 0.02
    # attention in a model this small is next to uniform, and errors in it next to nothing.
    "init_method_std": 0.15,
}
_EXPERTS = {
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "alltoall",
    "moe_grouped_gemm": True,
    "moe_router_load_balancing_type": "none",
}
# Four for four stages, or two of two chunks each; two without a pipeline.
_LAYERS, _FEWEST_LAYERS = 4, 2
_SHAPE: dict[str, Any] = {
    "num_layers": _LAYERS,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "position_embedding_type": "rope",
}
_DATA = Data(
    sequence_length=16,
    micro_batch_size=1,
    global_batch_size=8,
    # Every rank shuffles all that Megatron-Core's mock documents hold: of their own length, for
    # most of the time that a layout takes.
    mock_document_length=64,
)

DENSE = Recipe(
    name="dense",
    model=Model(**_SHAPE, transformer={**_TRANSFORMER, "add_bias_linear": True}),
    data=_DATA,
    training=Training(lr=1e-2),
)
MOE = Recipe(
    name="moe",
    model=Model(**_SHAPE, num_moe_experts=4, transformer=_TRANSFORMER | _EXPERTS),
    data=_DATA,
    training=Training(lr=1e-2),
)
"""The small models of a sweep that names no recipe: layouts decide what is tested, not width.

Where no pipeline splits their four layers they have two.
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One layout of a sweep."""

    recipe: str
    world_size: int
    layout: str
    """As a person writes it: `tp2 sp cp2`."""
    status: str
    """passed, wrong, or failed (it did not run to its end)."""
    conclusion: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All layouts of some recipes up to a number of ranks."""

    outcomes: tuple[Outcome, ...]
    refused: dict[str, int]
    """Layouts of each recipe that break a rule."""
    world_size: int
    steps: int
    seconds: float
    """Wall time of the layouts, added up; the runs of one rank are not in it."""

    def count(self, recipe: str, status: str) -> int:
        """Return how many layouts of a recipe ended so."""
        return sum(one.recipe == recipe and one.status == status for one in self.outcomes)

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values, with the versions that it was found for."""
        recipes = list(self.refused)
        return {
            "command": f"mcore-lab verify --sweep {' '.join(recipes)} --world {self.world_size}"
            + f" --steps {self.steps}" * (self.steps != STEPS),
            **_versions(),
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "summary": {
                recipe: {
                    status: self.count(recipe, status) for status in ("passed", "wrong", "failed")
                }
                | {"refused": self.refused[recipe]}
                for recipe in recipes
            },
            "outcomes": [asdict(one) for one in self.outcomes],
        }


def smallest(recipe: Recipe, world_size: int, layout: ParallelLayout) -> Recipe:
    """Return the recipe with as little as shows a layout at work.

    Its samples a step are those of `fewest_samples`. Its layers are its own, but for the small
    models of a sweep: an error shows in two of them as in four, in half the time.
    """
    model = recipe.model
    if model in (DENSE.model, MOE.model) and layout.pp == 1:
        model = replace(model, num_layers=_FEWEST_LAYERS)
    samples = fewest_samples(recipe, world_size, layout)
    return replace(recipe, model=model, data=replace(recipe.data, global_batch_size=samples))


def fewest_samples(recipe: Recipe, world_size: int, layout: ParallelLayout) -> int:
    """Return the samples a step that show a layout at work, at most the recipe's own.

    Each replica accumulates the gradients of two micro-batches or more, and of one a stage.
    """
    dp = layout.data_parallel_size(world_size)
    most, each = recipe.data.global_batch_size, recipe.data.micro_batch_size * dp
    for samples in range(each * max(2, layout.pp), most, each):
        data = replace(recipe.data, global_batch_size=samples)
        if not layout.check(recipe.model, data, world_size):
            return samples
    return most


def sweep(
    recipes: Sequence[Recipe],
    world_size: int,
    folder: Path,
    *,
    steps: int = STEPS,
    workers: int = 1,
) -> Iterator[Outcome | Sweep]:
    """Verify every layout up to `world_size` ranks; yield each outcome, and last the whole sweep.

    A layout is verified on as little as it needs, see `smallest`.
    What is found is kept in `folder`, a line a layout: a sweep that was interrupted goes on where
    it was, if recipe, versions and tolerances are the same. `workers` layouts run at a time.

    Raises RunFolderError where `folder` cannot be written, and RankFailedError if a worker is
    killed.
    """
    outcomes: list[Outcome] = []
    refused: dict[str, int] = {}
    for recipe in recipes:
        layouts, refused[recipe.name] = allowed_layouts(recipe, world_size)
        kept = _Kept(folder, recipe, steps)
        todo = []
        for world, layout in layouts:
            if known := kept.outcomes.get(_key(world, layout)):
                outcomes.append(known)
                yield known
            else:
                todo.append((world, layout))
        for outcome in _verified(recipe, todo, kept.folder, steps, workers):
            kept.add(outcome)
            outcomes.append(outcome)
            yield outcome
    yield Sweep(
        outcomes=tuple(outcomes),
        refused=refused,
        world_size=world_size,
        steps=steps,
        seconds=sum(one.seconds for one in outcomes),
    )


class _Kept:
    """The outcomes of a recipe that are known already, for these versions and tolerances."""

    def __init__(self, folder: Path, recipe: Recipe, steps: int) -> None:
        same = [
            recipe_to_toml(replace(recipe, layout=ParallelLayout())),
            str(steps),
            str(_FEWEST_LAYERS),
            str(_versions()),
            str(Tolerances.of(recipe, steps)),
        ]
        digest = hashlib.sha256("\n".join(same).encode()).hexdigest()[:12]
        self.folder = folder / f"{recipe.title}-{digest}"
        self._file = self.folder / "outcomes.jsonl"
        self.outcomes: dict[str, Outcome] = {}
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lines = self._file.read_text().splitlines() if self._file.exists() else []
        for line in lines:
            # A sweep that was killed may have left its last line unfinished.
            with suppress(json.JSONDecodeError):
                one = Outcome(**json.loads(line))
                self.outcomes[f"{one.world_size} {one.layout}"] = one
        if lines and len(self.outcomes) < len(lines):
            self._write("w", *self.outcomes.values())

    def add(self, outcome: Outcome) -> None:
        self._write("a", outcome)

    def _write(self, mode: str, *outcomes: Outcome) -> None:
        with _writing(self.folder), self._file.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(one)) + "\n" for one in outcomes)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"cannot keep what is found in {folder}: {error.strerror}; --folder names another"
        ) from error


def _verified(
    recipe: Recipe,
    layouts: Sequence[tuple[int, ParallelLayout]],
    folder: Path,
    steps: int,
    workers: int,
) -> Iterator[Outcome]:
    if not layouts:
        return
    device = choose_device(max(world for world, _ in layouts)).type
    sizes: list[_Size] = []
    references: dict[_Size, Reference] = {}
    for layout in layouts:
        small = smallest(recipe, *layout)
        size = small.model.num_layers, small.data.global_batch_size
        sizes.append(size)
        if size not in references:
            its_folder = folder / "{}_layers_{}_samples".format(*size)
            references[size] = Reference(small, its_folder, steps, timeout=_SECONDS, device=device)
    # Else a worker may find the stores of the references' launches to be garbage, and wait for
    # their threads, which it does not have.
    gc.collect()
    # Forked here, a worker has imported everything, and has what the references computed.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (references, device))
    with sigterm_raises(), pool:
        waiting = [
            pool.submit(_outcome_of_worker, size, recipe, *layout)
            for size, layout in zip(sizes, layouts, strict=True)
        ]
        try:
            yield from (done.result() for done in as_completed(waiting))
        except BrokenProcessPool:
            raise RankFailedError(
                "a worker of the sweep was killed; the same command goes on with what it was at"
            ) from None
        except BaseException:
            # Else the pool would wait for all layouts that are queued.
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


_Size = tuple[int, int]
"""Layers, and samples a step."""
_of_worker: dict[_Size, Reference] = {}
"""In a worker, the references by their sizes: they are forked with it, not sent for a layout."""


def _begin_worker(references: dict[_Size, Reference], device: str) -> None:
    # Between two layouts a worker ends without a word: the process that forked it speaks.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number))
    end_with_parent()
    _of_worker.update(references)
    if device == "cpu":
        # Once here, and not in every rank of every layout.
        cpu.enable()


def _outcome_of_worker(size: _Size, recipe: Recipe, world: int, layout: ParallelLayout) -> Outcome:
    try:
        return _outcome(_of_worker[size], recipe, world, layout)
    except (KeyboardInterrupt, SystemExit):
        # The pool would take it for what this layout came to, and give the worker the next.
        os._exit(1)


def _outcome(reference: Reference, recipe: Recipe, world: int, layout: ParallelLayout) -> Outcome:
    started = time.perf_counter()
    try:
        report: VerificationReport = reference.verify(layout, world)
        status, conclusion = ("passed" if report.passed else "wrong"), report.conclusion
    except LabError as error:
        status, conclusion = "failed", str(error)
    return Outcome(
        recipe=recipe.name,
        world_size=world,
        layout=layout_words(world, layout),
        status=status,
        conclusion=conclusion,
        seconds=round(time.perf_counter() - started, 2),
    )


def _key(world: int, layout: ParallelLayout) -> str:
    return f"{world} {layout_words(world, layout)}"


def layout_words(world: int, layout: ParallelLayout) -> str:
    """Return a layout as a person writes it, `tp2 sp dp4`; nothing for one that splits nothing."""
    return in_words(sizes_in_use(layout, world))


def _versions() -> dict[str, str]:
    packages = {"megatron_core": "megatron-core", "torch": "torch"}
    return {name: importlib.metadata.version(package) for name, package in packages.items()}
