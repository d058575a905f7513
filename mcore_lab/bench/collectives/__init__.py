"""Collectives over the groups of a layout: what each moves, what it leaves, and how fast it is."""
