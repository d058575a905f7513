"""Ranks that sample from a checkpoint: on any layout, whichever wrote it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from mcore_lab.config import Recipe
from mcore_lab.errors import ConfigError
from mcore_lab.layout import ParallelLayout
from mcore_lab.model import BuildChunk
from mcore_lab.recipes.builder import recipe_chunk
from mcore_lab.recipes.carried import embedding_rows
from mcore_lab.runtime import RankLog, choose_device, launch, process_group
from mcore_lab.runtime.together import fail_together
from mcore_lab.sample.choice import Choice
from mcore_lab.sample.decoder import Decoder, num_microbatches
from mcore_lab.sample.vocabulary import Speech, Vocabulary

_NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the model has made of a prompt."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    """Those that follow the prompt."""
    ended: str
    """Why it ends: `length`, or `document` where the model has ended it, by a token left out."""


def to_sample(recipe: Recipe, checkpoint: Path, layout: ParallelLayout, nproc: int) -> Recipe:
    """Return the recipe of a checkpoint as its model is sampled from on `nproc` ranks.

    Raises ConfigError for a model that does not foresee tokens, CheckpointError if the checkpoint
    cannot be read, and LayoutError if the layout breaks a rule.
    """
    if not recipe.model.causal_attention:
        raise ConfigError(
            f"{recipe.name} cannot be sampled from: without causal attention its tokens see those "
            "that follow, and foresee none"
        )
    if recipe.data.memory_sequences is not None:
        raise ConfigError(
            f"{recipe.name} cannot be sampled from: each token of its data is its own label, and "
            "none is foreseen"
        )
    recipe = replace(
        recipe,
        layout=layout,
        model=replace(
            recipe.model,
            # The embedding has the rows that the data's tokenizer needed when it was trained.
            vocab_size=embedding_rows(checkpoint),
            # Nothing is dropped: no layout is refused for how it would drop.
            transformer={**recipe.model.transformer, **_NO_DROPOUT},
        ),
        # Each replica takes the same sequence, alone.
        data=replace(
            recipe.data,
            micro_batch_size=1,
            global_batch_size=nproc * num_microbatches(recipe, layout),
            pack_documents=False,
        ),
    )
    layout.require(recipe.model, recipe.data, nproc)
    return recipe


def context(recipe: Recipe) -> int:
    """Return how many tokens the model sees at most."""
    return recipe.model.max_sequence_length or recipe.data.sequence_length


def sample(
    checkpoint: Path,
    recipe: Recipe,
    nproc: int,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    choice: Choice | None = None,
    vocabulary: Vocabulary | None = None,
    speaks: bool = False,
    build: BuildChunk = recipe_chunk,
    timeout: float | None = None,
) -> list[Sample]:
    """Return what the model goes on with after each prompt, of up to `max_new_tokens` tokens.

    `recipe` is `to_sample`'s; `vocabulary` is that of its data if not given. A sequence longer than
    the model's context is seen by its end. One rank chooses each token, from logits gathered of
    all, and tells the others: they differ between layouts by rounding alone. With `speaks` rank 0
    prints prompts and tokens as they come. Raises ConfigError for a prompt that the model cannot
    take, and CheckpointError.
    """
    choice = choice or Choice()
    choice.require_sensible()
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must not be below 1; it is {max_new_tokens}")
    for prompt in prompts:
        if len(prompt) > context(recipe):
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens is longer than the {context(recipe)} that the "
                "model sees at once"
            )
    how = (choice, vocabulary or Vocabulary.of(recipe.data), max_new_tokens, speaks)
    device = choose_device(nproc).type
    arguments = (device, checkpoint, recipe, build, [tuple(prompt) for prompt in prompts], *how)
    return launch(_rank, nproc, *arguments, device=device, timeout=timeout)[0]


def _rank(
    device: str,
    checkpoint: Path,
    recipe: Recipe,
    build: BuildChunk,
    prompts: list[tuple[int, ...]],
    choice: Choice,
    vocabulary: Vocabulary,
    max_new_tokens: int,
    speaks: bool,
) -> list[Sample]:
    with RankLog(int(os.environ["RANK"])), process_group(device=device) as world:
        decoder = Decoder(recipe, world, checkpoint, build)
        window = context(recipe)
        # The last rank is on the last pipeline stage, where logits are.
        chooser = world.size - 1

        def next_token(tokens: Sequence[int], draw: torch.Generator) -> int:
            logits = decoder.logits(tokens[-window:])
            token = torch.zeros(1, dtype=torch.int64, device=torch.cuda.current_device())
            with fail_together():
                if world.rank == chooser:
                    assert logits is not None
                    # Rows beyond the vocabulary are there to be divisible.
                    token[0] = choice.token(logits[: vocabulary.size], draw)
            dist.broadcast(token, src=chooser)
            return int(token)

        found = []
        for number, prompt in enumerate(prompts):
            say = _voice(vocabulary, prompt) if speaks and world.is_first else _silence
            draw = torch.Generator().manual_seed(choice.seed + number)
            tokens = list(prompt)
            ended = "length"
            while len(tokens) < len(prompt) + max_new_tokens:
                token = next_token(tokens, draw)
                if token == vocabulary.end_of_document:
                    ended = "document"
                    break
                tokens.append(token)
                say([token], False)
            say([], True)
            found.append(Sample(prompt=prompt, tokens=tuple(tokens[len(prompt) :]), ended=ended))
        return found


def _silence(tokens: Sequence[int], ends: bool) -> None:
    """Print nothing."""


def _voice(vocabulary: Vocabulary, prompt: Sequence[int]) -> Callable[[Sequence[int], bool], None]:
    """Print the prompt; return what prints the tokens that follow it, as they come."""
    speech = Speech(vocabulary)

    def say(tokens: Sequence[int], ends: bool) -> None:
        words = speech.of(tokens, ends=ends)
        print(words, end="\n" if ends else "", flush=True, file=sys.stdout)

    say(prompt, False)
    return say
