"""The settings of ``task=text_editing``."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.core.config import TaskConfig

__all__ = ["METHODS", "TASKS", "TextEditingConfig"]


@dataclass
class TextEditingConfig(TaskConfig):
    """Move sentences of films' reviews by preferences of sentiment, and rewrite them.

    decoder: folder of an editor trained by ``pfm train-decoder`` on the sentences that
        ``python -m benchmarks.text_editing.sentences`` writes. device: where it writes.
    drafts: of each corpus, other ones for every seed. draws: sentences that an edit is compared with.
    labelled: sentences that the labelling judge is fitted on. reference: sentences that preferences are drawn from.
    samples: edits of a draft. guidance: of the editor. perplexity: by the base SmolLM2, where it is installed.
    rounds: of edits, each of what the round before it wrote, moved again.
    few_shot: pairs that the base model is shown to rewrite a draft, the rival of as many samples; 0 for none.
    settings: measure only those whose names begin with one of these, such as ["copy", "flow best-of-8"]; empty for all.
    """

    decoder: str = "runs/decoder"
    device: str = "auto"
    drafts: int = 100
    draws: int = 1000
    labelled: int = 6000
    reference: int = 6000
    samples: int = 4
    guidance: float = 1.0
    perplexity: bool = True
    rounds: int = 1
    few_shot: int = 4
    settings: list[str] = field(default_factory=list[str])


TASKS = {"text_editing": TextEditingConfig}
METHODS: dict[str, type] = {}
