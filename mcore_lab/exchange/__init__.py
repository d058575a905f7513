"""Weights out and in: whole tensors in safetensors files, under names that others know.

`checkpoint export` and `checkpoint import` are made of it. A naming (`naming`, `huggingface_names`)
says where in a checkpoint each tensor of a file lies, and is read in both directions.
"""

RECIPE_FILE = "recipe.toml"
"""What says which model tensors under Megatron-Core's names are of; it lies beside them."""
