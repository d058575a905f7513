"""Megatron-Core is imported here first, as ranks that are forked from this process expect it."""

from __future__ import annotations

from mcore_lab import cpu

cpu.preload()
