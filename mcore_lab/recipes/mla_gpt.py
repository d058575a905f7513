"""Multi-latent attention over two tensor-parallel ranks.

Why: keys and values are kept as one small latent vector a token, from which each head's are made: a
cache a fraction of the size.

What to look at: the up-projections are split by heads, the down-projections are whole on each rank.
Source: DeepSeek-AI, arXiv:2405.04434.
"""

from __future__ import annotations

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes._small import DATA, TRAINING, small_gpt

RECIPE = Recipe(
    name="mla_gpt",
    layout=ParallelLayout(
        tensor_model_parallel_size=2,
    ),
    model=small_gpt(
        position_embedding_type="rope",
        transformer={
            "multi_latent_attention": True,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_head_dim": 32,
            "qk_pos_emb_head_dim": 16,
            "v_head_dim": 32,
            "rope_type": "rope",
        },
    ),
    data=DATA,
    training=TRAINING,
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
