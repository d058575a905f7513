"""A GPT that goes on on other layouts: two tensor-parallel ranks, two stages, then one rank.

Why: a checkpoint holds a model, not its layout. Each rank writes its shards with their places in
the whole, weights and Adam's moments alike, and a rank of any other layout reads what is its own.

What to look at: `metrics.jsonl` is one curve of all steps, and its losses are those of one rank
that was never stopped, to 1e-5. The last leg needs one rank: the other leaves the group, and ends.
"""

from __future__ import annotations

from dataclasses import replace

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes import NextLayout
from mcore_lab.recipes._small import DATA, TRAINING, small_gpt

RECIPE = Recipe(
    name="reshard_gpt",
    layout=ParallelLayout(
        tensor_model_parallel_size=2,
    ),
    model=small_gpt(),
    data=DATA,
    training=replace(TRAINING, steps=15),
)

THEN = (
    NextLayout(layout=ParallelLayout(pipeline_model_parallel_size=2)),
    NextLayout(layout=ParallelLayout(), ranks=1),
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
