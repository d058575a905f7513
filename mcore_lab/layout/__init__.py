"""Parallel sizes, the rules they must keep, and where they place each rank. No torch in here."""

from __future__ import annotations

from mcore_lab.layout.parallel import SHORT_NAMES, ParallelLayout
from mcore_lab.layout.rules.report import BrokenRule
from mcore_lab.layout.shares import RankShare, rank_shares

__all__ = ["SHORT_NAMES", "BrokenRule", "ParallelLayout", "RankShare", "rank_shares"]
