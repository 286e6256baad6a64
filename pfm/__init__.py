"""Preference flows: a learned vector field refines the outputs of any frozen generator.

Names are imported when they are first used, so that ``import pfm`` and ``pfm --help`` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pfm import decoders, distances, encoders, generators, judges, pbrl, preferences, references, tastes
    from pfm.composition import Composition, compose
    from pfm.config import FlowConfig
    from pfm.couplings import register_coupling
    from pfm.encoded import EncodedPairs
    from pfm.errors import EncodingError, GenerationError, NonFiniteWarning, NotRegisteredError, PfmError
    from pfm.evaluation import Report, Scored, evaluate
    from pfm.flow import PreferenceFlow
    from pfm.pairs import PreferenceDataError, PreferencePairs
    from pfm.refiner import Refinement, Refiner, wrap
    from pfm.registered_field import register_field
    from pfm.transport import register_solver

_HOME = {
    "Composition": "composition",
    "EncodedPairs": "encoded",
    "EncodingError": "errors",
    "FlowConfig": "config",
    "GenerationError": "errors",
    "NonFiniteWarning": "errors",
    "NotRegisteredError": "errors",
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
    "register_coupling": "couplings",
    "register_field": "registered_field",
    "register_solver": "transport",
    "wrap": "refiner",
}

__all__ = [
    "Composition",
    "EncodedPairs",
    "EncodingError",
    "FlowConfig",
    "GenerationError",
    "NonFiniteWarning",
    "NotRegisteredError",
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
    "register_coupling",
    "register_field",
    "register_solver",
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
