"""Packed documents under context parallelism: each is split over two ranks, and sees only itself.

Why: documents are shorter than the sequences that fill a GPU. Packed one after the other nothing
is wasted, but attention must not go from one to the next, and the ranks must share each of them.

What to look at: documents of 1 to 48 tokens, in samples of 64; each is padded to a multiple of
2 * cp so that both ranks have a chunk from either end of it. The loss is that of one rank, where
nothing is padded.
"""

from __future__ import annotations

from dataclasses import replace

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes._small import DATA, TRAINING, small_gpt

RECIPE = Recipe(
    name="cp2_packed_gpt",
    layout=ParallelLayout(
        context_parallel_size=2,
    ),
    model=small_gpt(position_embedding_type="rope"),
    data=replace(DATA, mock_document_length=48, pack_documents=True),
    training=TRAINING,
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
