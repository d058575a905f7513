"""`mcore-lab sample`: what a checkpoint's model goes on with after a prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_lab.checkpoint.folders import require_checkpoint
from mcore_lab.cli.arguments import smallest_world
from mcore_lab.config import LaunchSettings, parse_recipe
from mcore_lab.errors import ConfigError
from mcore_lab.layout import ParallelLayout
from mcore_lab.report.tables import print_json

if TYPE_CHECKING:
    from mcore_lab.sample.run import Sample
    from mcore_lab.sample.vocabulary import Vocabulary

_PROG = "mcore-lab sample"
_USAGE = f"""\
usage: {_PROG} RUN --prompt TEXT ... [options]

Go on with a text from a checkpoint, one token at a time: RUN is a checkpoint, or a run's folder for
its latest. A run on text has a token for each byte. A run on mock data knows no text: its prompts
are tokens, --tokens 1,2,3. Several prompts follow one option, or each has its own.

  --temperature T      1 draws as the model has learnt, below 1 bolder; 0 takes the most probable
  --top-k K            draw among the K most probable tokens
  --top-p P            draw among the fewest tokens that have probability P together
  --seed N             of the draws
  --max-new-tokens N   at most; a model that ends its document stops before
  --nproc N            ranks; one, or as few as the layout allows
  --layout.tp N ...    any layout, whichever wrote the checkpoint; the tokens are the same
  --module FILE.py     builds a model of your own: a checkpoint alone runs no code
  --json               print JSON

`{_PROG} RUN --help` shows every option, with that run's values."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings(LaunchSettings):
    """What `mcore-lab sample` says apart from the recipe."""

    prompt: tuple[str, ...] = ()
    """Texts to go on with; an empty one begins a document."""
    tokens: tuple[str, ...] = ()
    """The same as tokens: 1,2,3."""
    max_new_tokens: int = 64
    """Tokens that follow a prompt at most."""
    temperature: float = 1.0
    """What logits are divided by; with 0 the most probable token is taken."""
    top_k: int | None = None
    """Choose among so many of the most probable tokens only."""
    top_p: float | None = None
    """Choose among the fewest most probable tokens that have this probability together."""
    seed: int = 1234
    """Seed of the draws."""
    module: str | None = None
    """The file of Python that builds the model, if it is one of your own."""


def main(argv: Sequence[str]) -> int:
    """Print each prompt and what follows, as it comes on a terminal; return 0."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise ConfigError(f"the run comes first: {_PROG} RUN {argv[0]} ...")
    source = require_checkpoint(Path(argv[0]))

    from mcore_lab.recipes.carried import recipe_in, with_named_module

    carried = replace(recipe_in(source), layout=ParallelLayout())
    arguments = parse_recipe(carried, argv[1:], f"{_PROG} {argv[0]}", SampleSettings)
    own = arguments.own
    recipe = with_named_module(arguments.recipe, source, own["module"])

    from mcore_lab.sample.choice import Choice
    from mcore_lab.sample.run import sample, to_sample
    from mcore_lab.sample.vocabulary import Vocabulary

    vocabulary = Vocabulary.of(recipe.data, recipe.model.vocab_size)
    prompts = [vocabulary.tokens_of_text(text) for text in own["prompt"]]
    prompts += [vocabulary.tokens_of_numbers(words) for words in own["tokens"]]
    if not prompts:
        raise ConfigError(
            "no prompt: " + ("--prompt TEXT" if vocabulary.is_text else "--tokens 1,2,3")
        )
    nproc = smallest_world(recipe.layout) if arguments.nproc is None else arguments.nproc
    recipe = to_sample(recipe, source, recipe.layout, nproc)
    speaks = sys.stdout.isatty() and not arguments.json
    samples = sample(
        source,
        recipe,
        nproc,
        prompts,
        max_new_tokens=own["max_new_tokens"],
        choice=Choice(**{field.name: own[field.name] for field in fields(Choice)}),
        vocabulary=vocabulary,
        speaks=speaks,
    )
    if arguments.json:
        found = [_plain(one, vocabulary) for one in samples]
        print_json({"checkpoint": str(source), "nproc": nproc, "samples": found})
    elif not speaks:
        for one in samples:
            print(vocabulary.spoken([*one.prompt, *one.tokens]))
    return 0


def _plain(one: Sample, vocabulary: Vocabulary) -> dict[str, object]:
    if not vocabulary.is_text:
        return asdict(one)
    return asdict(one) | {
        "prompt_text": vocabulary.text(one.prompt),
        "text": vocabulary.text(one.tokens),
    }
