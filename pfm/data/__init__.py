"""Preference data: rows as people have them, the pairs they become, and the tensors those are encoded to."""

from pfm._internal import lazy as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
