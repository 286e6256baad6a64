"""Explanations: what a flow changes, in words, traits and directions."""

from pfm._internal import lazy as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
