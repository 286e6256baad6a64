"""The tensor layer: couplings, fields, their training and integration, win probabilities, and the flow made of them.

It knows tensors only: no text, no network, no files but checkpoints.
"""

from pfm._internal import lazy as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
