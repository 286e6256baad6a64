"""Preference flows: a learned vector field refines the outputs of any frozen generator.

Names are imported when they are first used, so that ``import pfm`` and ``pfm --help`` do not wait for torch. Which
names there are, the stub beside this file says.
"""

from pfm._internal import lazy as _lazy
from pfm._internal import moved as _moved

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
_moved.install()
