"""Refinement: a frozen generator wrapped by a flow, an encoder and a decoder."""

from pfm._internal import lazy as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
