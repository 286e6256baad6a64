"""Preference flows: a learned vector field refines the outputs of any frozen generator."""

from pfm.config import FlowConfig
from pfm.encoded import EncodedPairs
from pfm.flow import PreferenceFlow

__all__ = ["EncodedPairs", "FlowConfig", "PreferenceFlow"]
