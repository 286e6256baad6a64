"""Preference models as tastes in a mixture, found by EM or given by groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfm._internal.archive import load_tensors, read_description, read_folder, save_folder, save_tensors
from pfm._internal.checks import check_number, check_seed, check_whole
from pfm._internal.files import replace_json, require_files
from pfm._internal.significance import Confirmation, confirmed
from pfm.data.encoded import EncodedPairs
from pfm.devices import with_standard_defaults
from pfm.flow.composition import check_weights
from pfm.preferences import BradleyTerry, PreferenceModel, load
from pfm.preferences.base import unfitted
from pfm.tastes.adapted import AdaptedTaste, Votes
from pfm.tastes.likelihood import NEGLIGIBLE, mixed_log_odds, rater_likelihood, vote_loss, vote_scores, vote_weight
from pfm.tastes.raters import number_raters, renumber

__all__ = ["TasteMixture", "held_out_votes"]

DESCRIPTION, TENSORS = "tastes.json", "tastes.safetensors"
HELD_OUT = 0.2  # share of each rater's pairs by which a mixture is judged
CONVERGED = 1e-5  # nats a pair
RANK = 8  # axes of a correction
MIN_VOTES, FEW, PRIOR_RATERS = 6, 20, 32  # the prior is chosen by up to so many raters, from so many votes of each
PRIORS = tuple((a, c) for a in (0.03, 0.3, 1.0) for c in (0.03, 0.1, 0.3, 1.0, 3.0))  # spread, correction
START_AXES = 16  # principal axes of the raters' mean votes in which EM's first clusters are made


@with_standard_defaults
class TasteMixture:
    """Finds K tastes among raters, as preference models with the raters' shares in them.

    A rater of few votes is no group of its own: its responsibilities stay near the shares of all raters, and one
    without votes has exactly these.

    Args:
        tastes: number K of tastes to look for.
        component: makes an unfitted preference model.
        restarts: runs of EM from different starts, of which the likeliest is kept.
        iterations: most iterations of a run.
        confirm: keep the mixture only if held-out votes confirm it (one-sided 95% over raters); else one taste
            remains.
        seed: of starts and held-out pairs.

    Attributes:
        models: the tastes, K of them or one.
        shares: (K,) pi, the share of raters with each taste.
        names: of the tastes: the groups', or numbers.
        raters: names of the raters. responsibilities: (R, K) of each rater for each taste.
        prior: (spread, correction) that :meth:`adapt` takes where it is given none.
        found: what the fit found, as JSON values: ``gain`` in log loss on held-out votes over one model of all, nats
            a pair, ``z`` its z-score over raters, ``log_likelihood`` nats a pair by iteration.
    """

    def __init__(
        self,
        tastes: int = 2,
        component: Callable[[], PreferenceModel] = BradleyTerry,
        *,
        restarts: int = 4,
        iterations: int = 50,
        confirm: bool = True,
        seed: int = 0,
    ) -> None:
        seed = check_seed(seed)
        self.tastes: int = check_whole("tastes", tastes, 1)
        self.restarts: int = check_whole("restarts", restarts, 1)
        self.iterations: int = check_whole("iterations", iterations, 1)
        self.component, self.confirm, self.seed = component, confirm, seed
        self.models: list[PreferenceModel] = []
        self.shares = torch.zeros(0)
        self.names: tuple[str, ...] = ()
        self.raters: list[Hashable] = []
        self.responsibilities = torch.zeros(0, 0)
        self.found: dict[str, Any] = {}
        self.prior = (0.1, 0.3)
        self._axes = torch.zeros(0, 0)

    # -- fitting ------------------------------------------------------------------------------------------------

    def fit(self, pairs: EncodedPairs, raters: Any) -> TasteMixture:
        """Find the tastes by EM, on the CPU, and return the mixture itself.

        Args:
            pairs: N labelled pairs; soft labels and weights count.
            raters: (N,) names of who labelled each, any hashable values; or of what else shares a
                taste, as the prompts ``pairs.group``.

        Raises:
            ValueError: the number of names is not that of pairs, or fewer raters than tastes have votes.
        """
        names, index = number_raters(raters, len(pairs))
        if len(names) < self.tastes:
            raise ValueError(f"tastes={self.tastes} needs at least as many raters: got {len(names)}; use fewer tastes")
        self.raters, pairs = names, pairs.to("cpu")
        self._set_axes(pairs)
        pooled = self.component().fit(pairs)
        self.models, self.shares, self.found = [pooled], torch.ones(1), {}
        self.responsibilities = torch.ones(len(names), 1)
        if self.tastes > 1:
            gain, found = self._judged(pairs, index)
            self.found = {"gain": gain, "z": found.z, "confirmed": bool(found)}
            if found or not self.confirm:
                self.models, self.shares, self.responsibilities, trace = self._run(pairs, index, len(names))
                self.found["log_likelihood"] = trace
        self.names = tuple(map(str, range(len(self.models))))
        self._choose_prior(pairs, index)
        return self

    @classmethod
    def of_groups(
        cls,
        pairs: EncodedPairs,
        groups: Any,
        names: Sequence[Hashable] | None = None,
        component: Callable[[], PreferenceModel] = BradleyTerry,
    ) -> TasteMixture:
        """Fit one taste a known group; its "raters" are the groups.

        Args:
            pairs: N labelled pairs. groups: (N,) the group of each pair's rater.
            names: the groups that there should be; None for those that there are.

        Raises:
            ValueError: a named group has no pairs, or a pair is of a group that is not named.
        """
        present, index = number_raters(groups, len(pairs), "groups")
        if names is not None:
            index = renumber(present, index, list(names))
            present = list(names)
        self, pairs = cls(len(present), component, confirm=False), pairs.to("cpu")
        self._set_axes(pairs)
        for name, number in zip(present, range(len(present)), strict=True):
            if float(vote_weight(pairs)[index == number].sum()) <= 0:
                raise ValueError(f"group {name!r} has only pairs of weight 0: leave the group out or give it votes")
        self.models = [component().fit(pairs.select(index == number)) for number in range(len(present))]
        self.shares = torch.bincount(index, minlength=len(present)).float() / len(pairs)
        self.raters, self.names = list(present), tuple(map(str, present))
        self.responsibilities = torch.eye(len(present))
        return self

    def _set_axes(self, pairs: EncodedPairs) -> None:
        """Keep the principal axes of the pairs' differences, scaled so that all together have unit mean square."""
        batch = pairs.gather(torch.arange(len(pairs)))
        difference = (batch.chosen - batch.rejected).double()
        values, vectors = torch.linalg.eigh(difference.T @ difference / len(difference))
        values, vectors = values.flip(0).clamp_min(1e-30), vectors.flip(1)
        kept = values > values[0] * 1e-9
        self._axes = (vectors[:, kept] / values[kept].sqrt()).float()

    def _run(
        self, pairs: EncodedPairs, index: Tensor, raters: int
    ) -> tuple[list[PreferenceModel], Tensor, Tensor, list[float]]:
        """Run EM from several starts; give models, shares, responsibilities and the likelihoods of the likeliest."""
        generator = torch.Generator().manual_seed(self.seed)
        runs = [self._em(pairs, index, self._start(pairs, index, raters, generator)) for _ in range(self.restarts)]
        return max(runs, key=lambda run: run[3][-1])

    def _em(
        self, pairs: EncodedPairs, index: Tensor, responsibilities: Tensor
    ) -> tuple[list[PreferenceModel], Tensor, Tensor, list[float]]:
        trace: list[float] = []
        total = float(vote_weight(pairs).sum())
        while True:
            models = [self._fitted(pairs, share[index]) for share in responsibilities.T]
            # One vote of each kind more than there are: no taste dies out for want of raters.
            shares = (responsibilities.sum(0) + 1) / (len(responsibilities) + len(models))
            likelihood = rater_likelihood(models, pairs, index, len(responsibilities)) + shares.log()
            responsibilities = likelihood.softmax(1).float()
            trace.append(float(likelihood.logsumexp(1).sum()) / total)
            if len(trace) >= self.iterations or (len(trace) > 1 and trace[-1] - trace[-2] < CONVERGED):
                order = shares.argsort(descending=True)
                return [models[k] for k in order.tolist()], shares[order].float(), responsibilities[:, order], trace

    def _fitted(self, pairs: EncodedPairs, share: Tensor) -> PreferenceModel:
        kept = share > NEGLIGIBLE
        if not bool(kept.any()):
            kept = share >= share.max()
        part = pairs.select(kept)
        part.weight = (vote_weight(pairs) * share)[kept]
        return self.component().fit(part)

    def _start(self, pairs: EncodedPairs, index: Tensor, raters: int, generator: torch.Generator) -> Tensor:
        """Cluster the raters by the mean of their signed differences: k-means++ and a few steps of k-means."""
        batch = pairs.gather(torch.arange(len(pairs)))
        axes = self._axes[:, :START_AXES]
        signed = ((batch.chosen - batch.rejected) @ axes) * ((2 * batch.probability - 1) * batch.weight)[:, None]
        mean = torch.zeros(raters, axes.shape[1]).index_add_(0, index, signed)
        count = torch.zeros(raters).index_add_(0, index, batch.weight)
        # Means of few votes are shrunk by the noise of a vote, so that they do not seed a cluster.
        mean = mean / (count + float(count.mean()))[:, None]
        centres = mean[torch.randint(raters, (1,), generator=generator)]
        while len(centres) < self.tastes:
            squares = torch.cdist(mean, centres).square().amin(1).clamp_min(1e-12)
            centres = torch.cat([centres, mean[torch.multinomial(squares, 1, generator=generator)]])
        for _ in range(10):
            nearest = torch.cdist(mean, centres).argmin(1)
            for number in range(self.tastes):
                if bool((nearest == number).any()):
                    centres[number] = mean[nearest == number].mean(0)
        hard = torch.nn.functional.one_hot(torch.cdist(mean, centres).argmin(1), self.tastes).float()
        return 0.8 * hard + 0.2 / self.tastes

    def _judged(self, pairs: EncodedPairs, index: Tensor) -> tuple[float, Confirmation]:
        """Fit on four fifths of each rater's pairs; give the gain on the others over one model of all, and its test."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        held = held_out_votes(index, generator)
        if not bool(held.any()) or len(torch.unique(index[~held])) < self.tastes:
            return 0.0, confirmed(torch.zeros(0), torch.zeros(0))
        train, test = pairs.select(~held), pairs.select(held)
        pooled = self.component().fit(train)
        models, _, responsibilities, _ = self._run(train, index[~held], len(self.raters))
        score = torch.stack([vote_scores(model, test) for model in models], dim=1)
        mixed = mixed_log_odds(score, responsibilities[index[held]])
        weight = vote_weight(test)
        better = vote_loss(vote_scores(pooled, test), test) - vote_loss(mixed, test)
        return float((better * weight).sum() / weight.sum()), confirmed(better, index[held], weight)

    # -- using --------------------------------------------------------------------------------------------------

    def of_rater(self, rater: Hashable) -> Tensor:
        """Return the responsibilities (K,) of a rater's name; of one that is not known, the shares of all."""
        self._check_fitted()
        return self.responsibilities[self.raters.index(rater)] if rater in self.raters else self.shares

    def infer(self, pairs: EncodedPairs) -> Tensor:
        """Return the responsibilities (K,) of a rater who is not among those fitted on, from its pairs."""
        self._check_fitted()
        pairs = pairs.to("cpu")
        every = torch.zeros(len(pairs), dtype=torch.long)
        return (rater_likelihood(self.models, pairs, every, 1)[0] + self.shares.log()).softmax(0).float()

    def scores(self, y: Any, other: Any, context: Any = None) -> Tensor:
        """Return each taste's log-odds (B, K) that y (B, \\*D) is preferred to other (B, \\*D)."""
        self._check_fitted()
        return torch.stack([model.score(y, other, context) for model in self.models], dim=1)

    def score(self, y: Any, other: Any, context: Any = None, *, weights: Any = None) -> Tensor:
        """Return the log-odds (B,) that y is preferred to other by a rater whose taste is drawn with ``weights``.

        Args:
            weights: (K,), or (B, K) for every row its own: a rater's responsibilities; None for the shares.
        """
        scores = self.scores(y, other, context)
        return mixed_log_odds(scores, self._weights(weights).to(scores.device))

    def win_probability(self, y: Any, opponents: Any, context: Any = None, *, weights: Any = None) -> Tensor:
        """Return the mean probability (B,) that y is preferred to opponents (M, \\*D) or (B, M, D), by such a rater."""
        self._check_fitted()
        wins = torch.stack([model.win_probability(y, opponents, context) for model in self.models], dim=1)
        return (wins * self._weights(weights).to(wins.device)).sum(1)

    def adapt(
        self, pairs: EncodedPairs, *, rank: int = RANK, spread: float | None = None, correction: float | None = None
    ) -> AdaptedTaste:
        """Fit a new rater's taste from few pairs: K + r coefficients, by MAP.

        With rho the responsibilities of these pairs, the log-odds are those of the mixture weighted by rho, plus
        sum_k a_k s_k(y, y') + u . (f(y) - f(y')), with f the leading principal axes of the training pairs'
        differences. The prior is a ~ N(0, spread^2), u ~ N(0, .): without votes nothing moves, and every vote moves it
        by little.

        Args:
            pairs: the rater's pairs, from one on.
            rank: number r of axes; 0 for none.
            spread: prior standard deviation of each a_k; None for what served the raters of the fit best.
            correction: prior standard deviation, in log-odds, of the correction of a typical training pair; None
                likewise.

        Raises:
            ValueError: an argument is out of range, or the pairs are of other outputs.
        """
        self._check_fitted()
        rank = check_whole("rank", rank, 0)
        spread = self.prior[0] if spread is None else spread
        correction = self.prior[1] if correction is None else correction
        for name, value in (("spread", spread), ("correction", correction)):
            check_number(name, value, above=0)
        if pairs.dimension != self._axes.shape[0]:
            raise ValueError(f"pairs must hold outputs of {self._axes.shape[0]} values: got {pairs.dimension}")
        axes, pairs = self._leading(rank), pairs.to("cpu")
        batch = pairs.gather(torch.arange(len(pairs)))
        votes = Votes(
            self.scores(batch.chosen, batch.rejected, batch.context), (batch.chosen - batch.rejected) @ axes,
            batch.probability, batch.weight,
        )  # fmt: skip
        start, found = votes.coefficients(self.shares, spread, correction)
        return AdaptedTaste(self, start, found[: len(start)], axes @ found[len(start) :])

    def _leading(self, rank: int) -> Tensor:
        axes = self._axes[:, :rank]
        return axes / math.sqrt(max(axes.shape[1], 1))

    def _choose_prior(self, pairs: EncodedPairs, index: Tensor) -> None:
        """Choose the prior of :meth:`adapt` with which some votes of a rater of the fit predict its others best."""
        batch = pairs.gather(torch.arange(len(pairs)))
        every = Votes(
            self.scores(batch.chosen, batch.rejected, batch.context),
            (batch.chosen - batch.rejected) @ self._leading(RANK), batch.probability, batch.weight,
        )  # fmt: skip
        loss = dict.fromkeys(PRIORS, 0.0)
        for rater in (torch.bincount(index) >= MIN_VOTES).nonzero().flatten()[:PRIOR_RATERS].tolist():
            own = (index == rater).nonzero().flatten()
            own = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(self.seed))]
            few = min(len(own) // 2, FEW)
            some, others = every.select(own[:few]), every.select(own[few:])
            for prior in PRIORS:
                start, found = some.coefficients(self.shares, *prior)
                loss[prior] += others.loss(start, found)
        self.prior = min(PRIORS, key=lambda prior: loss[prior])

    def _weights(self, weights: Any) -> Tensor:
        return self.shares if weights is None else check_weights("weights", weights, len(self.models))

    def save(self, folder: str | Path) -> Path:
        """Write the tastes and what is known of their raters to a folder; :meth:`load` reads it.

        Raises:
            RuntimeError: the mixture is not fitted. TypeError: a rater's name is no text, number or truth value.
        """
        self._check_fitted()
        for rater in self.raters:
            if not isinstance(rater, str | int | float):
                raise TypeError(f"raters must be named by texts or numbers to be saved: got {rater!r}")
        folder = Path(folder).expanduser()
        described = {
            "version": 1, "names": list(self.names), "raters": self.raters, "prior": list(self.prior),
            "found": self.found, "models": len(self.models),
            "settings": {"tastes": self.tastes, "restarts": self.restarts, "iterations": self.iterations,
                         "confirm": self.confirm, "seed": self.seed},
        }  # fmt: skip
        tensors = {"shares": self.shares, "responsibilities": self.responsibilities, "axes": self._axes}
        with save_folder(folder) as staging:
            for number, model in enumerate(self.models):
                model.save(staging / f"taste-{number}")
            save_tensors(staging / TENSORS, tensors)
            replace_json(staging / DESCRIPTION, described)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> TasteMixture:
        """Load what :meth:`save` wrote.

        Raises:
            FileNotFoundError: the folder or one of its files is not there. ValueError: a file is damaged.
        """
        folder = Path(folder).expanduser()
        return read_folder(folder, (DESCRIPTION, TENSORS, "taste-*/*"), lambda: cls._load(folder))

    @classmethod
    def _load(cls, folder: Path) -> TasteMixture:
        require_files(folder, (DESCRIPTION, TENSORS), "TasteMixture.save")
        try:
            described = read_description(folder / DESCRIPTION)
            models = [load(folder / f"taste-{number}") for number in range(described["models"])]
            tensors = load_tensors(folder / TENSORS)
            made = models[0].describe()
            self = cls(component=partial(unfitted, {name: made[name] for name in ("kind", "settings")}),
                       **described["settings"])  # fmt: skip
            self.models, self.names, self.raters = models, tuple(described["names"]), described["raters"]
            self.found, self.prior = described["found"], tuple(described["prior"])
            self.shares, self.responsibilities = tensors["shares"], tensors["responsibilities"]
            self._axes = tensors["axes"]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{folder} holds a damaged mixture of tastes ({error}): save or fit it again") from error
        return self

    def _check_fitted(self) -> None:
        if not self.models:
            raise RuntimeError("TasteMixture is not fitted: call fit(pairs, raters) first")


def held_out_votes(index: Tensor, generator: torch.Generator) -> Tensor:
    """Mark a share of each rater's pairs (N,); raters of few pairs give one in so many by chance."""
    order = torch.randperm(len(index), generator=generator)
    held = torch.zeros(len(index), dtype=torch.bool)
    held[order] = _rank_within(index[order]) % round(1 / HELD_OUT) == round(1 / HELD_OUT) - 1
    return held


def _rank_within(index: Tensor) -> Tensor:
    """Return the number (N,) of each row among those of its rater, in order."""
    order = index.argsort(stable=True)
    counts = torch.bincount(index)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(index)
    rank[order] = torch.arange(len(index)) - starts[index[order]]
    return rank
