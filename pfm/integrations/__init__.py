"""Adapters: a flow as TRL's reward function, DSPy's metric, inspect_ai's scorer; a refiner as LangChain's runnable.

None of these libraries is a dependency: each is imported when its adapter is made.
"""

from pfm._internal import lazy as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
