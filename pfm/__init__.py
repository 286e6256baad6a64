"""Preference flows: a learned vector field refines the outputs of any frozen generator."""

from pfm import encoders, generators, preferences
from pfm.config import FlowConfig
from pfm.encoded import EncodedPairs
from pfm.errors import EncodingError, GenerationError, PfmError
from pfm.evaluation import Report, Scored, evaluate
from pfm.flow import PreferenceFlow
from pfm.pairs import PreferenceDataError, PreferencePairs
from pfm.refiner import Refinement, Refiner, wrap

__all__ = [
    "EncodedPairs",
    "EncodingError",
    "FlowConfig",
    "GenerationError",
    "PfmError",
    "PreferenceDataError",
    "PreferenceFlow",
    "PreferencePairs",
    "Refinement",
    "Refiner",
    "Report",
    "Scored",
    "encoders",
    "evaluate",
    "generators",
    "preferences",
    "wrap",
]
