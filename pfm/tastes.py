"""Several tastes: raters who want different things, in known groups or found by votes alone.

A *taste* is a preference model; K of them make a mixture. Each rater i holds one, taste k with probability pi_k, and
votes independently by it:

    P(votes of i) = sum over k of pi_k prod over i's pairs n of P_k(label_n).

Where groups are known, :meth:`TasteMixture.of_groups` fits one model a group. Where they are not, EM (Dempster et al.
1977) alternates between each rater's responsibilities r_ik ~ pi_k prod_n P_k(label_n) and weighted fits of the models.
A mixture is kept only if it predicts held-out votes of its raters better than one model of all: raters whose names
mean nothing give one taste.

For a new rater of few votes, :meth:`TasteMixture.adapt` fits K + r coefficients with a prior at what the votes say
under the mixture. Fields follow tastes: :func:`taste_flows` fits one a taste, to be blended at run time
(:class:`pfm.flow.composition.Composition`), :func:`with_code` conditions a single field on a code of the rater.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from pfm._internal.archive import load_tensors, read_description, read_folder, save_folder, save_tensors
from pfm._internal.files import replace_json, require_files
from pfm._internal.significance import Confirmation, confirmed
from pfm.data.encoded import EncodedPairs
from pfm.data.tensors import as_float_tensor, check_finite
from pfm.devices import standard_defaults, with_standard_defaults
from pfm.flow.composition import Composition, check_weights
from pfm.flow.config import FlowConfig
from pfm.flow.preference_flow import PreferenceFlow
from pfm.preferences import BradleyTerry, PreferenceModel, load
from pfm.preferences.base import unfitted
from pfm.preferences.newton import newton_logistic

__all__ = ["AdaptedTaste", "TasteMixture", "append_code", "check_names", "number_raters", "taste_flows", "with_code"]

DESCRIPTION, TENSORS = "tastes.json", "tastes.safetensors"
NEGLIGIBLE = 1e-4  # responsibility below which a rater's votes are left out of a taste's fit
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
        for name, value in (("tastes", tastes), ("restarts", restarts), ("iterations", iterations)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1: got {value!r}")
        self.tastes, self.component = tastes, component
        self.restarts, self.iterations, self.confirm, self.seed = restarts, iterations, confirm, seed
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
            raters: (N,) names of who labelled each, any values that can be told apart; or of what else shares a
                taste, as the prompts ``pairs.group``.

        Raises:
            ValueError: the number of names is not that of pairs, or fewer raters than tastes have votes.
        """
        names, index = number_raters(raters, len(pairs))
        if len(names) < self.tastes:
            raise ValueError(
                f"tastes={self.tastes} needs at least as many raters: got {len(names)}; ask for fewer tastes"
            )
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
            index = _renumbered(present, index, list(names))
            present = list(names)
        self, pairs = cls(len(present), component, confirm=False), pairs.to("cpu")
        self._set_axes(pairs)
        for name, number in zip(present, range(len(present)), strict=True):
            if float(_weight(pairs)[index == number].sum()) <= 0:
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
        total = float(_weight(pairs).sum())
        while True:
            models = [self._fitted(pairs, share[index]) for share in responsibilities.T]
            # One vote of each kind more than there are: no taste dies out for want of raters.
            shares = (responsibilities.sum(0) + 1) / (len(responsibilities) + len(models))
            likelihood = _likelihood(models, pairs, index, len(responsibilities)) + shares.log()
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
        part.weight = (_weight(pairs) * share)[kept]
        return self.component().fit(part)

    def _start(self, pairs: EncodedPairs, index: Tensor, raters: int, generator: torch.Generator) -> Tensor:
        """Cluster the raters by the mean of their signed differences: k-means++ and a few steps of k-means."""
        batch = pairs.gather(torch.arange(len(pairs)))
        axes = self._axes[:, :START_AXES]
        signed = ((batch.chosen - batch.rejected) @ axes) * ((2 * batch.probability - 1) * batch.weight)[:, None]
        mean = torch.zeros(raters, axes.shape[1]).index_add_(0, index, signed)
        count = torch.zeros(raters).index_add_(0, index, batch.weight)
        # Means of few votes are drawn in by the noise of a vote, so that they do not seed a cluster.
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
        held = _held_out(index, generator)
        if not bool(held.any()) or len(torch.unique(index[~held])) < self.tastes:
            return 0.0, confirmed(torch.zeros(0), torch.zeros(0))
        train, test = pairs.select(~held), pairs.select(held)
        pooled = self.component().fit(train)
        models, _, responsibilities, _ = self._run(train, index[~held], len(self.raters))
        score = torch.stack([_scores(model, test) for model in models], dim=1)
        mixed = _mixed(score, responsibilities[index[held]])
        weight = _weight(test)
        better = _loss(_scores(pooled, test), test) - _loss(mixed, test)
        return float((better * weight).sum() / weight.sum()), confirmed(better, index[held], weight)

    # -- using --------------------------------------------------------------------------------------------------

    def of_rater(self, rater: Hashable) -> Tensor:
        """Give the responsibilities (K,) of a rater's name; of one that is not known, the shares of all."""
        self._check_fitted()
        return self.responsibilities[self.raters.index(rater)] if rater in self.raters else self.shares

    def infer(self, pairs: EncodedPairs) -> Tensor:
        """Give the responsibilities (K,) of a rater who is not among those fitted on, from its pairs."""
        self._check_fitted()
        pairs = pairs.to("cpu")
        every = torch.zeros(len(pairs), dtype=torch.long)
        return (_likelihood(self.models, pairs, every, 1)[0] + self.shares.log()).softmax(0).float()

    def scores(self, y: Any, other: Any, context: Any = None) -> Tensor:
        """Give each taste's log-odds (B, K) that y (B, \\*D) is preferred to other (B, \\*D)."""
        self._check_fitted()
        return torch.stack([model.score(y, other, context) for model in self.models], dim=1)

    def score(self, y: Any, other: Any, context: Any = None, *, weights: Any = None) -> Tensor:
        """Give the log-odds (B,) that y is preferred to other by a rater whose taste is drawn with ``weights``.

        Args:
            weights: (K,), or (B, K) for every row its own: a rater's responsibilities; None for the shares.
        """
        scores = self.scores(y, other, context)
        return _mixed(scores, self._weights(weights).to(scores.device))

    def win_probability(self, y: Any, opponents: Any, context: Any = None, *, weights: Any = None) -> Tensor:
        """Give the mean probability (B,) that y is preferred to opponents (M, \\*D) or (B, M, D), by such a rater."""
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
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ValueError(f"rank must be a whole number of at least 0: got {rank!r}")
        spread = self.prior[0] if spread is None else spread
        correction = self.prior[1] if correction is None else correction
        for name, value in (("spread", spread), ("correction", correction)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number: got {value}")
        if pairs.dimension != self._axes.shape[0]:
            raise ValueError(f"pairs must hold outputs of {self._axes.shape[0]} values: got {pairs.dimension}")
        axes, pairs = self._leading(rank), pairs.to("cpu")
        batch = pairs.gather(torch.arange(len(pairs)))
        votes = _Votes(
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
        every = _Votes(
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


@with_standard_defaults
class AdaptedTaste:
    """Is one rater's taste, made by :meth:`TasteMixture.adapt`.

    Attributes:
        responsibilities: (K,) of the rater's pairs for each taste.
        blend: (K,) coefficients of the tastes' log-odds beyond them. correction: (D,) the linear part.
    """

    def __init__(self, mixture: TasteMixture, responsibilities: Tensor, blend: Tensor, correction: Tensor) -> None:
        self.mixture, self.responsibilities = mixture, responsibilities
        self.blend, self.correction = blend, correction

    def score(self, y: Any, other: Any, context: Any = None) -> Tensor:
        """Give the log-odds (B,) that y (B, \\*D) is preferred to other (B, \\*D)."""
        y = as_float_tensor("y", y).float()
        difference = y - as_float_tensor("other", other).to(y.device, torch.float32)
        scores = self.mixture.scores(y, other, context)
        own, blend, correction = (part.to(y.device) for part in (self.responsibilities, self.blend, self.correction))
        return _mixed(scores, own) + scores @ blend + difference.flatten(1) @ correction

    def win_probability(self, y: Any, opponents: Any, context: Any = None) -> Tensor:
        """Give the mean probability (B,) that y (B, \\*D) is preferred to its opponents, (M, \\*D) for all of y."""
        y, opponents = (as_float_tensor(n, v).float() for n, v in (("y", y), ("opponents", opponents)))
        if opponents.shape[1:] != y.shape[1:] or len(opponents) == 0:
            raise ValueError(f"opponents must be (M, {', '.join(map(str, y.shape[1:]))}): got {tuple(opponents.shape)}")
        wins = y.new_zeros(len(y))
        for one in opponents:
            wins += torch.sigmoid(self.score(y, one.expand_as(y), context))
        return wins / len(opponents)

    @property
    def weights(self) -> Tensor:
        """Give weights (K,) for a composition of the tastes' flows: what is positive of both parts, with sum 1."""
        positive = (self.responsibilities + self.blend).clamp_min(0)
        return positive / positive.sum() if float(positive.sum()) > 0 else self.responsibilities


# -- fields of tastes ------------------------------------------------------------------------------------------------


@standard_defaults
def taste_flows(
    pairs: EncodedPairs,
    memberships: Any,
    config: FlowConfig | Mapping[str, Any] | None = None,
    *,
    names: Sequence[Hashable] | None = None,
    progress: bool = False,
) -> Composition:
    """Fit one flow a taste, each on all pairs of its raters, and compose them with equal weights.

    Args:
        pairs: N labelled pairs.
        memberships: (N,) the group of each pair's rater; or (N, K) its rater's responsibilities, each row with sum 1,
            as ``mixture.responsibilities[index]`` gives them: pairs count for a taste with that weight.
        config: settings of all flows.
        names: of the tastes; with groups, those that there should be.

    Raises:
        ValueError: a group or taste has no pairs.
    """
    if isinstance(memberships, Tensor) and memberships.ndim == 2:
        share = check_weights("memberships", memberships, memberships.shape[1])
        names = list(range(share.shape[1])) if names is None else list(names)
        if len(names) != share.shape[1]:
            raise ValueError(f"names must be {share.shape[1]}, one a taste: got {len(names)}")
    else:
        present, index = number_raters(memberships, len(pairs), "memberships")
        if names is not None:
            index, present = _renumbered(present, index, list(names)), list(names)
        names, share = present, torch.nn.functional.one_hot(index, len(present)).float()
    if len(share) != len(pairs):
        raise ValueError(f"memberships must be of the {len(pairs)} pairs: got {len(share)}")
    share = share.cpu()
    held = share * _weight(pairs)[:, None].cpu() > NEGLIGIBLE
    for name, kept in zip(names, held.T, strict=True):
        if int(kept.sum()) < 2:
            raise ValueError(f"taste {name!r} has {int(kept.sum())} pairs: at least two are needed to fit a flow")
    flows = []
    for column, kept in zip(share.T, held.T, strict=True):
        part = pairs.select(kept)
        if bool((column[kept] < 1).any()) or pairs.weight is not None:
            part.weight = (_weight(pairs).cpu() * column)[kept].to(pairs.device)
        flows.append(PreferenceFlow.fit(part, config, progress=progress))
    return Composition(flows, torch.full((len(flows),), 1 / len(flows)), [str(name) for name in names])


def with_code(pairs: EncodedPairs, code: Any) -> EncodedPairs:
    """Append a code of the rater to each pair's context, for a single flow that is conditioned on it.

    The code may be one-hot in the groups, a rater's responsibilities, or any numbers that tell raters apart;
    :func:`append_code` makes the contexts to apply such a flow under. Its closed-form field shifts outputs with the
    code, and its network may turn them; the reward in its b is linear in the outputs alone, so that opposite tastes
    cancel there: for b by taste ask the models of a :class:`TasteMixture`.

    Args:
        pairs: N labelled pairs, with contexts or without.
        code: (N, K).
    """
    code = as_float_tensor("code", code).to(pairs.device, torch.float32)
    if code.ndim != 2 or len(code) != len(pairs):
        raise ValueError(f"code must be ({len(pairs)}, K), one row a pair: got {tuple(code.shape)}")
    check_finite("code", code)
    context = pairs.context
    joined = code if context is None else torch.cat([context.float(), code], dim=1)
    contexts, context_index = torch.unique(joined, dim=0, return_inverse=True)
    one_table = pairs._tables[0] is pairs._tables[1]
    outputs = pairs._tables[0] if one_table else torch.cat(pairs._tables)
    chosen, rejected = pairs._indices
    return EncodedPairs.from_table(
        outputs.unflatten(1, pairs.event_shape),
        chosen,
        rejected if one_table else rejected + len(pairs._tables[0]),
        contexts=contexts, context_index=context_index,
        weight=pairs.weight, probability=pairs.probability, group=pairs.group, encoder=pairs.encoder, check=False,
    )  # fmt: skip


def append_code(context: Any, code: Any, count: int | None = None) -> Tensor:
    """Give contexts (B, C + K), on their device, from contexts (B, C), (C,) or None and a code (K,) or (B, K)."""
    code = as_float_tensor("code", code).float()
    code = code.to(context.device) if isinstance(context, Tensor) else code
    code = code[None] if code.ndim == 1 else code
    if context is None:
        return code if count is None else code.expand(count, -1)
    context = as_float_tensor("context", context).float()
    context = context[None] if context.ndim == 1 else context
    rows = max(len(context), len(code), count or 1)
    if len(context) not in (1, rows) or len(code) not in (1, rows):
        raise ValueError(f"context and code must have equally many rows, or one: got {len(context)} and {len(code)}")
    return torch.cat([context.expand(rows, -1), code.expand(rows, -1)], dim=1)


# -- names, likelihoods ----------------------------------------------------------------------------------------------


def check_names(name: str, values: Any, count: int) -> list[Any]:
    """Give names (N,) as a list, one a pair.

    Raises:
        ValueError: there are not ``count`` of them, or one is missing (None or NaN).
    """
    if isinstance(values, Tensor) and values.ndim != 1:
        raise ValueError(f"{name} must be ({count},), one a pair: got {tuple(values.shape)}")
    listed: list[Any] = values.tolist() if hasattr(values, "tolist") else list(values)
    if len(listed) != count:
        raise ValueError(f"{name} must be {count}, one a pair: got {len(listed)}")
    for row, value in enumerate(listed):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise ValueError(f"{name} must name every pair's: number {row} is {value!r}; leave such pairs out")
    return listed


def number_raters(raters: Any, count: int, name: str = "raters") -> tuple[list[Hashable], Tensor]:
    """Number names: give the distinct ones, sorted, and each pair's number (N,) int64.

    Raises:
        ValueError: as :func:`check_names`.
    """
    listed = check_names(name, raters, count)
    distinct = set(listed)
    try:
        ordered = sorted(distinct)
    except TypeError:
        ordered = sorted(distinct, key=str)
    places = {value: place for place, value in enumerate(ordered)}
    return ordered, torch.tensor([places[value] for value in listed])


def _renumbered(present: list[Hashable], index: Tensor, names: list[Hashable]) -> Tensor:
    unknown = [value for value in present if value not in names]
    if unknown:
        raise ValueError(f"groups must be among {names}: pairs are of {unknown} too")
    empty = [name for name in names if name not in present]
    if empty:
        raise ValueError(f"group {empty[0]!r} has no pairs: leave it out of names, or give it pairs")
    return torch.tensor([names.index(value) for value in present])[index]


def _weight(pairs: EncodedPairs) -> Tensor:
    ones = torch.ones(len(pairs), dtype=torch.float32, device=pairs.device)
    return ones if pairs.weight is None else pairs.weight


def _scores(model: PreferenceModel, pairs: EncodedPairs) -> Tensor:
    """Give the log-odds (N,) of chosen over rejected."""
    batch = pairs.gather(torch.arange(len(pairs)))
    return model.score(batch.chosen, batch.rejected, batch.context)


def _loss(score: Tensor, pairs: EncodedPairs) -> Tensor:
    """Give -log P(label) (N,) at log-odds (N,)."""
    each = softplus(-score)
    return each if pairs.probability is None else each + (1 - pairs.probability) * score


def _likelihood(models: Sequence[PreferenceModel], pairs: EncodedPairs, index: Tensor, raters: int) -> Tensor:
    """Give the log-likelihood (R, K) of each rater's votes under each model, float64."""
    weight = _weight(pairs).double()
    each = torch.stack([-_loss(_scores(model, pairs), pairs).double() * weight for model in models], dim=1)
    return torch.zeros(raters, len(models), dtype=torch.float64).index_add_(0, index, each)


def _mixed(scores: Tensor, weights: Tensor) -> Tensor:
    """Give the log-odds (B,) of sum_k w_k sigmoid(s_k), s (B, K); skew, as 1 - sigmoid(s) = sigmoid(-s)."""
    log = weights.clamp_min(1e-30).log()
    return (log + logsigmoid(scores)).logsumexp(1) - (log + logsigmoid(-scores)).logsumexp(1)


def _held_out(index: Tensor, generator: torch.Generator) -> Tensor:
    """Mark a share of each rater's pairs (N,); raters of few pairs give one in so many by chance."""
    order = torch.randperm(len(index), generator=generator)
    held = torch.zeros(len(index), dtype=torch.bool)
    held[order] = _rank_within(index[order]) % round(1 / HELD_OUT) == round(1 / HELD_OUT) - 1
    return held


def _rank_within(index: Tensor) -> Tensor:
    """Give the number (N,) of each row among those of its rater, in order."""
    order = index.argsort(stable=True)
    counts = torch.bincount(index)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(index)
    rank[order] = torch.arange(len(index)) - starts[index[order]]
    return rank


@dataclass(frozen=True)
class _Votes:
    """Holds some votes as a rater's few coefficients see them.

    ``scores`` (n, K) log-odds of chosen over rejected by taste, ``axes`` (n, r) their difference on the axes,
    ``probability`` and ``weight`` (n,).
    """

    scores: Tensor
    axes: Tensor
    probability: Tensor
    weight: Tensor

    def select(self, index: Tensor) -> _Votes:
        return _Votes(self.scores[index], self.axes[index], self.probability[index], self.weight[index])

    def coefficients(self, shares: Tensor, spread: float, correction: float) -> tuple[Tensor, Tensor]:
        """Give the responsibilities (K,) of the votes, and the MAP coefficients (K + r,) beyond them."""
        each = logsigmoid(self.scores) - (1 - self.probability[:, None]) * self.scores
        start = ((each * self.weight[:, None]).double().sum(0) + shares.double().log()).softmax(0).float()
        deviation = torch.cat([torch.full_like(start, spread), torch.full((self.axes.shape[1],), correction)]).double()
        rows = torch.cat([self.scores, self.axes], dim=1)
        # In units of the prior, whose curvature is then 1 whatever its scale.
        at, _ = newton_logistic(
            rows.double() * deviation, self.probability, self.weight, 1.0, offset=_mixed(self.scores, start)
        )
        return start, (at * deviation).float()

    def loss(self, start: Tensor, coefficients: Tensor) -> float:
        """Give the weighted mean of -log P(label); 0 for votes of no weight."""
        score = _mixed(self.scores, start) + torch.cat([self.scores, self.axes], dim=1) @ coefficients
        each = softplus(-score) + (1 - self.probability) * score
        return float((each * self.weight).sum() / self.weight.sum().clamp_min(1e-12))
