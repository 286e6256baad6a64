"""Scores and picks whose share of the gap from random to oracle is known by hand."""

SCORES = [[0.0, 1.0, 2.0], [3.0, 3.0, 3.0], [4.0, 0.0, 2.0]]
PICKS = [2, 0, 2]
BY_HAND = ((2 - 1) + 0 + (2 - 2)) / ((2 - 1) + 0 + (4 - 2))
