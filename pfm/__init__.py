"""Preference flows: a learned vector field refines the outputs of any frozen generator.

Names are imported when they are first used, so that ``import pfm`` and ``pfm --help`` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pfm import decoders, distances, encoders, generators, judges, pbrl, preferences, references, tastes
    from pfm.composition import Composition, compose
    from pfm.config import FlowConfig
    from pfm.data.encoded import EncodedPairs
    from pfm.data.pairs import PreferenceDataError, PreferencePairs
    from pfm.errors import EncodingError, GenerationError, NonFiniteWarning, PfmError
    from pfm.evaluation import Report, Scored, evaluate
    from pfm.flow import PreferenceFlow
    from pfm.refiner import Refinement, Refiner, wrap

_HOME = {
    "Composition": "composition",
    "EncodedPairs": "encoded",
    "EncodingError": "errors",
    "FlowConfig": "config",
    "GenerationError": "errors",
    "NonFiniteWarning": "errors",
    "PfmError": "errors",
    "PreferenceDataError": "pairs",
    "PreferenceFlow": "flow",
    "PreferencePairs": "pairs",
    "Refinement": "refiner",
    "Refiner": "refiner",
    "Report": "evaluation",
    "Scored": "evaluation",
    "compose": "composition",
    "evaluate": "evaluation",
    "wrap": "refiner",
}

__all__ = [
    "Composition",
    "EncodedPairs",
    "EncodingError",
    "FlowConfig",
    "GenerationError",
    "NonFiniteWarning",
    "PfmError",
    "PreferenceDataError",
    "PreferenceFlow",
    "PreferencePairs",
    "Refinement",
    "Refiner",
    "Report",
    "Scored",
    "compose",
    "decoders",
    "distances",
    "encoders",
    "evaluate",
    "generators",
    "judges",
    "pbrl",
    "preferences",
    "references",
    "tastes",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"pfm.{_HOME[name]}"), name)
    if name in __all__:
        return import_module(f"pfm.{name}")
    raise AttributeError(f"module 'pfm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
