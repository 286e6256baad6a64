"""Samples of one frozen model, scored by checks of instructions and by a classifier of other data."""
