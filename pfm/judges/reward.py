"""A judge that is a reward model: a sequence classifier of Transformers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pfm._internal.checks import check_whole
from pfm._internal.hub import check_folder, loading_problem, location
from pfm._internal.special_tokens import SpecialTokens
from pfm.data.conversations import conversation_text
from pfm.devices import best_device
from pfm.generators.base import Prompt
from pfm.judges.base import ScoringJudge

__all__ = ["RewardModelJudge"]


class RewardModelJudge(ScoringJudge):
    """Scores outputs with a sequence-classification model, as reward models are published.

    The score is the model's one logit; of two labels the second's minus the first's; of more, ``logit`` says which.
    A tokenizer with a chat template gets the conversation with the output as the assistant's turn; any other gets
    prompt and output as a pair of texts. Spellings of its special tokens in them are broken by a space.

    Args:
        model: a name on the hub, a folder, or a loaded model.
        tokenizer: the tokenizer of a loaded model.
        revision: commit, branch or tag on the hub.
        trust_remote_code: run code that comes with the model.
        device: of a model to be loaded, or "auto" for the best there is; a loaded model stays where it is.
        batch_size: outputs scored at once; only those of equally many tokens share a batch, so that no padding moves
            a score.
        max_length: most tokens that are read; None takes the tokenizer's own limit.
        logit: index of the logit that is the score, for models of several labels.
        temperature: scale of the scores in P = sigmoid(difference / temperature); 1 for models trained with the
            Bradley–Terry loss; None takes the higher score as certain.
        name: what reports call it.

    Raises:
        TypeError: a loaded model without a tokenizer, or a tokenizer beside a name.
        ValueError: the model cannot be loaded, or its labels do not say which is the score.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        device: str | int | torch.device = "auto",
        batch_size: int = 16,
        max_length: int | None = None,
        logit: int | None = None,
        temperature: float | None = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(temperature=temperature)
        check_whole("batch_size", batch_size, 1)
        self.batch_size = batch_size
        self.revision = revision
        self.logit = logit
        if isinstance(model, str | os.PathLike):
            if tokenizer is not None:
                raise TypeError("tokenizer goes with a loaded model; one that is loaded by name brings its own")
            shown = os.fspath(model)
            model, tokenizer = _loaded(shown, revision, device, trust_remote_code)
        else:
            if tokenizer is None:
                raise TypeError("a loaded model needs its tokenizer: RewardModelJudge(model, tokenizer)")
            shown = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
        self.name = name or Path(shown).name
        self.source = shown
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._special = SpecialTokens(tokenizer)
        self.max_length = max_length
        labels = int(model.config.num_labels)
        if logit is None and labels > 2:
            raise ValueError(f"{shown} has {labels} labels: say which one is the score, logit=0 to {labels - 1}")
        if logit is not None and not 0 <= logit < labels:
            raise ValueError(f"logit must lie in 0..{labels - 1}, got {logit}")
        if model.config.pad_token_id is None:  # needed by models that look for the last token, though none pads
            model.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else -1

    def __repr__(self) -> str:
        return f"RewardModelJudge({self.source!r})"

    def describe(self) -> dict[str, Any]:
        """Describe the model and how it is read."""
        return {
            "type": type(self).__name__,
            "name": self.name,
            "revision": self.revision,
            "logit": self.logit,
            "max_length": self.max_length,
            "temperature": self.temperature,
        }

    @torch.no_grad()
    def scores(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Score N responses in batches of equally many tokens."""
        rows = [self._tokens(prompt, text) for prompt, text in zip(prompts, responses, strict=True)]
        by_length: dict[int, list[int]] = {}
        for row, tokens in enumerate(rows):
            by_length.setdefault(len(tokens["input_ids"]), []).append(row)
        found = [0.0] * len(rows)
        for members in by_length.values():
            for start in range(0, len(members), self.batch_size):
                some = members[start : start + self.batch_size]
                batch = {
                    name: torch.tensor([rows[row][name] for row in some], device=self.model.device)
                    for name in rows[some[0]]
                }
                for row, score in zip(some, self._score(self.model(**batch).logits).tolist(), strict=True):
                    found[row] = score
        return found

    def _score(self, logits: torch.Tensor) -> torch.Tensor:
        """Return scores (B,) of logits (B, labels)."""
        logits = logits.float()
        if self.logit is not None:
            return logits[:, self.logit]
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]

    def _tokens(self, prompt: Prompt, text: str) -> dict[str, list[int]]:
        limits: dict[str, Any] = {"truncation": True, "max_length": self.max_length}
        if getattr(self.tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            whole = self._special.broken_turns([*turns, {"role": "assistant", "content": text}])
            found = self.tokenizer.apply_chat_template(whole, tokenize=True, return_dict=True, **limits)
        else:
            pair = (conversation_text(prompt), text) if prompt else (text,)
            found = self.tokenizer(*map(self._special.broken, pair), **limits)
        return {name: list(values) for name, values in found.items()}


def _loaded(name: str, revision: str | None, device: Any, trusted: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    where = best_device(device)
    check_folder(name, "model")
    place = location(name)
    options: dict[str, Any] = {} if Path(place).is_dir() else {"revision": revision}
    options["trust_remote_code"] = trusted
    try:
        model: Any = AutoModelForSequenceClassification.from_pretrained(place, **options)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:
        raise ValueError(
            f"cannot load {name} as a sequence-classification model: {loading_problem(name, error, trusted=trusted)}"
        ) from error
    return model.to(where), tokenizer
