"""Pictures of plain data: what goes in is numbers, what comes out is SVG."""

from mcore_lab.report.rank_map import rank_map_svg

__all__ = ["rank_map_svg"]
