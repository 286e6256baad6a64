"""A calibrated committee of preference models, and how far its members disagree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from pfm._internal.checks import check_seed, check_whole
from pfm.data.encoded import EncodedPairs
from pfm.preferences.base import Embedded, PreferenceModel, check_pairs, unfitted
from pfm.preferences.bradley_terry import BradleyTerry
from pfm.preferences.calibration import pair_scores, reliability
from pfm.preferences.general import HybridPreference
from pfm.preferences.logistic import PairwiseLogistic, smooth_labels

__all__ = ["PreferenceEnsemble"]

STACKING_PENALTY = 1e-4


class PreferenceEnsemble(PreferenceModel):
    """Adds the log-odds of models of several kinds, weighted by how well they predict prompts that they did not see.

    Each kind is fitted with one part of the prompts left out in turn, so that every pair is scored by models that did
    not see its prompt; on these scores the kinds get weights >= 0 by logistic regression, whose sum is the temperature.
    Kinds that get a weight are then fitted on all pairs: the weights come of models of fewer pairs, the members do not.
    The sum of skew scores is skew, and embeds as one model does.

    Args:
        members: models of the kinds to combine, fitted or not: their settings count; None for
            ``BradleyTerry(1e-3)`` and ``HybridPreference()``.
        folds: parts of the prompts, >= 2.
        seed: of the parts; fold number k adds k to a member's own seed.
    """

    shares: Tensor

    def __init__(
        self,
        members: Sequence[PreferenceModel | dict[str, Any]] | None = None,
        *,
        folds: int = 3,
        seed: int = 0,
    ) -> None:
        seed = check_seed(seed)
        super().__init__()
        folds = check_whole("folds", folds, 2)
        if members is None:
            members = [BradleyTerry(1e-3), HybridPreference()]
        if len(members) == 0:
            raise ValueError("members holds no models: at least one is needed")
        self.folds, self.seed = folds, seed
        self._kinds_of = [
            {"kind": type(member).__name__, "settings": member.settings()}
            if isinstance(member, PreferenceModel)
            else {name: member[name] for name in ("kind", "settings")}
            for member in members
        ]
        for kind in self._kinds_of:
            unfitted(kind)

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return {"members": self._kinds_of, "folds": self.folds, "seed": self.seed}

    def _build(self, dimension: int, context_dimension: int, members: list[dict[str, Any]]) -> None:
        from pfm.preferences.base import restored

        self.dimension, self.context_dimension = dimension, context_dimension
        self.models = nn.ModuleList(restored(described) for described in members)
        self.register_buffer("shares", torch.full((len(members),), 1 / max(len(members), 1)))

    @torch.no_grad()
    def fit(self, pairs: EncodedPairs, validation: EncodedPairs | None = None, *, progress: bool = False) -> Self:
        """Fit the members, weigh and calibrate them, and return the ensemble itself.

        ``found`` then holds the ``weights`` of the kinds, and ``accuracy``, ``log_loss`` and
        ``ece`` on pairs whose prompts the scoring members did not see: ``validation`` where it is given.
        """
        from tqdm import tqdm

        check_pairs(pairs, validation)
        kinds = len(self._kinds_of)
        part = _parts(pairs.group, self.folds, self.seed)
        numbers = part.unique().tolist() if validation is None else []
        scores = torch.zeros(len(pairs), kinds)
        with tqdm(total=kinds * (len(numbers) + 1), desc="Fitting members", disable=not progress) as bar:
            for number in numbers:
                out = part == number
                kept, left_out = pairs.select(~out), pairs.select(out)
                for place in range(kinds):
                    scores[out, place] = pair_scores(self._fitted(place, kept, number), left_out)
                    bar.update()
            models: dict[int, PreferenceModel] = {}
            judged = pairs if validation is None else validation
            if validation is not None:
                models = {place: self._fitted(place, pairs) for place in range(kinds)}
                scores = torch.stack([pair_scores(model, validation) for model in models.values()], dim=1)
            weights = _stacked(scores, judged)
            used = [place for place in range(kinds) if weights[place] > 0] or [0]
            for place in used:
                if place not in models:
                    models[place] = self._fitted(place, pairs)
                bar.update()
        self._ready(
            dimension=pairs.dimension,
            context_dimension=max(models[place].context_dimension for place in used),
            members=[models[place].describe() for place in used],
        )
        self.models = nn.ModuleList(models[place] for place in used)
        self.shares.copy_(weights[used])
        found = reliability(scores @ weights, judged.probability, judged.weight)
        self.found = {
            "weights": weights.tolist(),
            "accuracy": found.accuracy,
            "log_loss": found.log_loss,
            "ece": found.ece,
        }
        return self

    def _fitted(self, place: int, pairs: EncodedPairs, number: int = 0) -> PreferenceModel:
        member = unfitted(self._kinds_of[place])
        if hasattr(member, "seed"):
            member.seed += number  # pyright: ignore[reportAttributeAccessIssue, reportOperatorIssue]
        member._emphasis = self._emphasis
        return member.fit(pairs)

    def embed(self, y: Tensor, context: Tensor | None) -> Embedded:
        """Embed outputs by all members side by side."""
        parts = [
            model.embed(y, context).scaled(share) for model, share in zip(self._members(), self.shares, strict=True)
        ]
        reward = torch.stack([part.reward for part in parts]).sum(0)
        return Embedded(reward, torch.cat([part.planes for part in parts], dim=-1))

    def member_scores(self, y: Any, other: Any, context: Any = None) -> Tensor:
        """Return the log-odds (members, B) of each member that has a weight, scaled as if it stood alone.

        Their mean weighted by the shares is :meth:`score`; where they lie apart the members disagree.
        """
        total = float(self.shares.sum())
        return torch.stack([total * model.score(y, other, context) for model in self._members()])

    def _members(self) -> list[PreferenceModel]:
        return [model for model in self.models if isinstance(model, PreferenceModel)]

    def _rescale(self, slope: float) -> None:
        self.shares *= slope


def _parts(group: Tensor, count: int, seed: int) -> Tensor:
    """Deal the prompts into parts; pairs, where there are fewer prompts than parts."""
    names, member = torch.unique(group, return_inverse=True)
    if len(names) < count:
        names, member = torch.arange(len(group)), torch.arange(len(group))
    if len(names) < count:
        raise ValueError(f"folds={count} needs at least as many pairs: got {len(group)}")
    return (torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)) % count)[member]


def _stacked(scores: Tensor, pairs: EncodedPairs) -> Tensor:
    """Return weights (kinds,) >= 0 of scores (N, kinds) by penalised likelihood, those that would get less left out."""
    label = smooth_labels(torch.ones(len(scores)) if pairs.probability is None else pairs.probability)
    spread = scores.square().mean(0).sqrt().clamp_min(1e-12)
    kept = torch.ones(scores.shape[1], dtype=torch.bool)
    while bool(kept.any()):
        weights = torch.zeros(scores.shape[1])
        weights[kept] = PairwiseLogistic((scores / spread)[:, kept], pairs.weight, label).fit(STACKING_PENALTY, 100)
        if bool((weights >= 0).all()):
            return weights / spread
        kept &= weights > 0
    return torch.zeros(scores.shape[1])
