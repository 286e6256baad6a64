"""Preference models: who is preferred to whom, on frozen embeddings."""

from pfm.preferences.bradley_terry import BradleyTerry
from pfm.preferences.mean_shift import MeanShift

__all__ = ["BradleyTerry", "MeanShift"]
