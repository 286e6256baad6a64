"""Judges: say which of two outputs is better, to label pairs and to evaluate."""

from pfm.judges.base import Comparison, Judge, ScoringJudge, Verdict
from pfm.judges.llm import LLMJudge, Tally
from pfm.judges.reward import RewardModelJudge
from pfm.judges.scripted import ScriptedJudge
from pfm.judges.sparing import Pick, SparingJudge, SparingTally, pair_probability

__all__ = [
    "Comparison",
    "Judge",
    "LLMJudge",
    "Pick",
    "RewardModelJudge",
    "ScoringJudge",
    "ScriptedJudge",
    "SparingJudge",
    "SparingTally",
    "Tally",
    "Verdict",
    "pair_probability",
]
