"""The legs of a run: what it does on one layout before it goes on on the next. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mcore_lab.checkpoint.folders import latest_checkpoint, whole_checkpoints
from mcore_lab.config import Recipe, RunArguments
from mcore_lab.errors import ConfigError
from mcore_lab.layout import BrokenRule
from mcore_lab.layout.words import in_words, sizes_in_use
from mcore_lab.recipes import later_layouts
from mcore_lab.training import RunFolder
from mcore_lab.training.rules import decay_steps


@dataclass(frozen=True, kw_only=True)
class Leg:
    """A part of a run: the first ranks of all, in one layout, up to a step."""

    name: str
    """The recipe's, and which leg it is where there are several."""
    recipe: Recipe
    """The run's, in the leg's layout, and with the step that the leg ends at."""
    ranks: int

    @property
    def layout(self) -> str:
        """What is split, in words: `tp2`."""
        return in_words(sizes_in_use(self.recipe.layout, self.ranks)) or "nothing split"

    @property
    def place(self) -> str:
        """Where it runs, in words: `tp2 on 2 ranks`."""
        return f"{self.layout} on {self.ranks} rank{'s' * (self.ranks > 1)}"

    def to_run(self, arguments: RunArguments) -> RunArguments:
        """Return how to run it: as `arguments` say, but for its layout and the step it ends at."""
        recipe = self.recipe
        training = replace(recipe.training, resume=arguments.recipe.training.resume)
        return replace(arguments, recipe=replace(recipe, training=training))

    def broken_rules(self) -> list[BrokenRule]:
        """Return every rule that the leg's layout breaks."""
        return self.recipe.layout.check(self.recipe.model, self.recipe.data, self.ranks)


def legs(recipe: Recipe, world_size: int) -> list[Leg]:
    """Return the legs of a run on `world_size` ranks: one, but for a recipe of several layouts.

    Its steps are shared among them evenly. Raises ConfigError where a leg cannot hand on to the
    next.
    """
    later = later_layouts(recipe.name)
    if not later:
        return [Leg(name=recipe.title, recipe=recipe, ranks=world_size)]
    if not recipe.checkpoint.save:
        raise ConfigError(
            f"{recipe.name} goes on from its own checkpoints: without --checkpoint.save False"
        )
    layouts = [(recipe.layout, world_size), *((at.layout, at.ranks or world_size) for at in later)]
    # The learning rate's course is that of the whole run, whichever leg a step is in.
    course = replace(recipe.training, lr_decay_steps=decay_steps(recipe.training))
    return [
        Leg(
            name=f"{recipe.title}, leg {number} of {len(layouts)},",
            recipe=replace(
                recipe,
                layout=layout,
                training=replace(course, steps=course.steps * number // len(layouts)),
            ),
            ranks=ranks,
        )
        for number, (layout, ranks) in enumerate(layouts, start=1)
    ]


def legs_left(arguments: RunArguments, world_size: int) -> list[Leg]:
    """Return the legs of a run, without those that a run which goes on has behind it."""
    *first, last = legs(arguments.recipe, world_size)
    goes_on = arguments.recipe.training.resume == "auto"
    taken = _steps_in(RunFolder(arguments.run_dir)) if goes_on else 0
    return [*(leg for leg in first if not 0 < leg.recipe.training.steps <= taken), last]


def going_on(arguments: RunArguments, *, has_saved: bool) -> RunArguments:
    """Return how the next leg runs: from the checkpoint that this one has saved.

    One that took no step has saved none; the next then starts where it started.
    """
    recipe = arguments.recipe
    if has_saved:
        recipe = replace(recipe, training=replace(recipe.training, resume="auto"))
    return replace(arguments, recipe=recipe, fresh=False)


def _steps_in(folder: RunFolder) -> int:
    """Return the step of the checkpoint that the run in a folder goes on from; 0 if it has none."""
    latest = latest_checkpoint(folder.checkpoints)
    whole = whole_checkpoints(folder.checkpoints)
    return next((step for step, path in whole.items() if path == latest), 0)
