"""Evaluation: the report card of a refiner, measured from judged candidates."""

from pfm._internal import lazy as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
