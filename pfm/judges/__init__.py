"""Judges: say which of two outputs is better, to label pairs and to evaluate."""

from pfm.judges.base import Comparison, Judge, ScoringJudge, Verdict
from pfm.judges.llm import LLMJudge, Tally
from pfm.judges.reward import RewardModelJudge
from pfm.judges.scripted import ScriptedJudge

__all__ = [
    "Comparison",
    "Judge",
    "LLMJudge",
    "RewardModelJudge",
    "ScoringJudge",
    "ScriptedJudge",
    "Tally",
    "Verdict",
]
