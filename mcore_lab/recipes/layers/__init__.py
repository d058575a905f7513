"""A single layer at work: what a recipe with `LAYER` shows, in place of training a model."""
