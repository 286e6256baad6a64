"""Decoders: from vectors and their win probabilities back to one output."""

from pfm.decoders.select import Decoder, Select, Selection

__all__ = ["Decoder", "Select", "Selection"]
