"""Recipes as plain values, TOML in and out, and the command line's overrides. No torch in here."""

from __future__ import annotations

from mcore_lab.config.arguments import (
    LaunchSettings,
    RunArguments,
    Settings,
    TraceSettings,
    exit_with,
    is_rank_0,
    parse_recipe,
    parse_recipe_or_exit,
    parse_settings,
)
from mcore_lab.config.recipe import Checkpoint, Data, Model, Recipe, Training
from mcore_lab.config.toml import read_toml, recipe_from_toml, recipe_name, recipe_to_toml

__all__ = [
    "Checkpoint",
    "Data",
    "LaunchSettings",
    "Model",
    "Recipe",
    "RunArguments",
    "Settings",
    "TraceSettings",
    "Training",
    "exit_with",
    "is_rank_0",
    "parse_recipe",
    "parse_recipe_or_exit",
    "parse_settings",
    "read_toml",
    "recipe_from_toml",
    "recipe_name",
    "recipe_to_toml",
]
