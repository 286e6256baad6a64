"""Preference models: who is preferred to whom, on frozen embeddings."""

from pfm.data.votes import fit_prior, soft_labels
from pfm.preferences.base import Embedded, PreferenceModel, check_table, load
from pfm.preferences.bradley_terry import BradleyTerry
from pfm.preferences.calibration import Calibration, ReliabilityBin, calibration, reliability
from pfm.preferences.ensemble import PreferenceEnsemble
from pfm.preferences.general import GeneralPreference, HybridPreference
from pfm.preferences.mean_shift import MeanShift
from pfm.preferences.noise import corrected, unbiased_label
from pfm.preferences.raters import fit_raters, rater_index, reconcile
from pfm.preferences.ties import TieModel
from pfm.preferences.view import RelevancePreference, ViewPreference

__all__ = [
    "BradleyTerry",
    "Calibration",
    "Embedded",
    "GeneralPreference",
    "HybridPreference",
    "MeanShift",
    "PreferenceEnsemble",
    "PreferenceModel",
    "RelevancePreference",
    "ReliabilityBin",
    "TieModel",
    "ViewPreference",
    "calibration",
    "check_table",
    "corrected",
    "fit_prior",
    "fit_raters",
    "load",
    "rater_index",
    "reconcile",
    "reliability",
    "soft_labels",
    "unbiased_label",
]
