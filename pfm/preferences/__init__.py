"""Preference models: who is preferred to whom, on frozen embeddings."""

from pfm.preferences.bradley_terry import BradleyTerry

__all__ = ["BradleyTerry"]
