"""The win-probability head: b(y|x), the chance that y beats an independent draw of the reference.

b is the calibrated classifier of winners against losers: with p1 = 2 pi_ref b and p0 = 2 pi_ref (1 - b), the
odds p1 / p0 are b / (1 - b). The head is built like the field, a convex closed part first and a network beyond it
only where held-out prompts confirm it:

1. a Bradley-Terry reward r(y), linear in y and in the products of its leading principal components, whose
   penalties are chosen by cross-validation over prompts (the best few settings are averaged);
2. its mean over the reference given the context, m(x), by ridge regression, and a logistic calibration
   logit b = a (r - m) + c, both on predictions for prompts that the reward was not fitted on;
3. a small network g(y, x) added to the logit.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from pfm.confirmation import CONFIRMED, standard_errors
from pfm.encoded import EncodedPairs, PairBatch
from pfm.preferences.logistic import PairwiseLogistic, drawn_in, fit_platt, pairwise_log_loss

__all__ = ["WinFit", "WinHead"]

PENALTIES = (1e-1, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)  # from strong to weak: each start is the last solution
PRODUCT_SCALES = (
    0.0,
    0.05,
    0.1,
)  # of a product of two unit-variance components, against |y| of unit mean square
COMPONENTS = 8
FOLDS = 5
AVERAGED = 4
CV_PAIRS = 20_000
FIT_PAIRS = 30_000


@dataclass
class WinFit:
    """Holds what the fit of the head found, on prompts that each prediction's model had not seen.

    ``settings`` are the (penalty, scale of products) whose rewards are averaged. ``accuracy`` is the share of
    held-out pairs ordered rightly, ``z`` the number of standard errors, over prompts, by which it exceeds one half,
    ``log_loss`` is in nats a pair (log 2 = 0.693 for a coin), ``network_gain`` in nats an output.
    """

    settings: list[tuple[float, float]]
    accuracy: float
    log_loss: float
    z: float
    network_kept: bool
    network_gain: float

    def to_dict(self) -> dict[str, Any]:
        """Give the figures as JSON values; what is not finite - every held-out pair ordered rightly - is None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


class WinHead(nn.Module):
    """Gives logit b(y|x); fitted by :meth:`fit`, in the coordinates of the raw outputs and contexts."""

    def __init__(self, dimension: int, context_dimension: int, hidden: int = 64) -> None:
        super().__init__()
        components = min(COMPONENTS, dimension)
        products = components * (components + 1) // 2
        for name, value in {
            "mean": torch.zeros(dimension),
            "scale": torch.ones(()),
            "axes": torch.zeros(dimension, components),
            "product_mean": torch.zeros(products),
            "weights": torch.zeros(dimension),
            "product_weights": torch.zeros(products),
            "context_mean": torch.zeros(context_dimension),
            "context_weights": torch.zeros(context_dimension),
            "slope": torch.zeros(()),
            "offset": torch.zeros(()),
            "gain": torch.zeros(()),
            "margin": torch.tensor(math.inf),
            "spread": torch.ones(dimension),
            "context_spread": torch.ones(context_dimension),
        }.items():
            self.register_buffer(name, value)
        self.network: nn.Sequential | None = nn.Sequential(
            nn.Linear(dimension + context_dimension, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, 1),
        )  # fmt: skip

    # The buffers, typed.
    mean: Tensor
    scale: Tensor
    axes: Tensor
    product_mean: Tensor
    weights: Tensor
    product_weights: Tensor
    context_mean: Tensor
    context_weights: Tensor
    slope: Tensor
    offset: Tensor
    gain: Tensor
    margin: Tensor
    spread: Tensor
    context_spread: Tensor

    def drop_network(self) -> None:
        """Leave the network out for good: held-out prompts did not confirm it."""
        self.network = None
        self.gain.zero_()

    def forward(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Give logit b (B,) of outputs y (B, D) under contexts (B, C) or None."""
        logit = self.offset + self.slope * (self.reward(y) - self._reference_reward(context))
        if self.network is not None:
            logit = logit + self.gain * self.network(self._inputs(y, context)).squeeze(-1)
        return logit

    def reward(self, y: Tensor) -> Tensor:
        """Give the Bradley-Terry reward (B,) of outputs y (B, D), before calibration."""
        linear, products = self._features(y)
        return linear @ self.weights + products @ self.product_weights

    def _reference_reward(self, context: Tensor | None) -> Tensor | float:
        return 0.0 if context is None else (context - self.context_mean) @ self.context_weights

    def _inputs(self, y: Tensor, context: Tensor | None) -> Tensor:
        inputs = (y - self.mean) / self.spread
        if context is None:
            return inputs
        return torch.cat([inputs, (context - self.context_mean) / self.context_spread], dim=-1)

    def _features(self, y: Tensor) -> tuple[Tensor, Tensor]:
        linear = (y - self.mean) / self.scale
        # Clipped, so that one outlying text does not dominate a product.
        leading = (linear @ self.axes).clamp(-4, 4)
        first, second = torch.triu_indices(leading.shape[-1], leading.shape[-1], device=y.device)
        return linear, leading[..., first] * leading[..., second] - self.product_mean

    @torch.no_grad()
    def fit(self, pairs: EncodedPairs, *, seed: int = 0, network: bool = True) -> WinFit:
        """Fit all parts of the head on labelled pairs.

        Predictions used for calibration, margin and figures come from models that did not see their prompts
        (:data:`FOLDS`-fold over prompts; over pairs when there is one prompt only).
        """
        generator = torch.Generator().manual_seed(seed)
        index = torch.arange(len(pairs))
        if len(pairs) > FIT_PAIRS:
            index = torch.randperm(len(pairs), generator=generator)[:FIT_PAIRS]
        batch, group = pairs.gather(index), pairs.group[index]
        fold = _folds(group, generator)
        self._set_coordinates(batch)
        linear_a, products_a = self._features(batch.chosen)
        linear_b, products_b = self._features(batch.rejected)
        problem = _Problem(linear_a - linear_b, products_a - products_b, batch.weight, batch.probability)

        settings, fold_weights = _cross_validate(problem, fold)
        loose_a, loose_b = torch.zeros(len(index)), torch.zeros(len(index))
        for number, (weights, product_weights) in fold_weights.items():
            part = fold == number
            loose_a[part] = linear_a[part] @ weights + products_a[part] @ product_weights
            loose_b[part] = linear_b[part] @ weights + products_b[part] @ product_weights
        every = torch.ones_like(fold, dtype=torch.bool)
        fits = [problem.solver(every, scale).fit(penalty, iterations=100) for penalty, scale in settings]
        weights, product_weights = problem.average(fits, settings)
        self.weights.copy_(weights)
        self.product_weights.copy_(product_weights)

        both = (loose_a + loose_b) / 2
        reference = self._fit_reference_reward(batch.context, both, fold)
        reward = torch.stack([loose_a - reference, loose_b - reference])
        label = drawn_in(torch.stack([batch.probability, 1 - batch.probability]))
        slope, offset = fit_platt(reward.flatten(), label.flatten(), batch.weight.repeat(2))
        self.slope.fill_(slope)
        self.offset.fill_(offset - slope * float(both.mean()))
        logit = slope * reward + offset

        network_gain = 0.0
        seen_by_none = torch.ones_like(fold, dtype=torch.bool)
        if network:
            held_out = fold == 0
            correction, network_gain = self._fit_network(batch, logit, label, held_out, group, generator)
            if self.network is not None:
                logit, seen_by_none = logit + correction, held_out
        else:
            self.drop_network()

        gap = torch.sigmoid(logit[0]) - torch.sigmoid(logit[1])
        gap, weight, probability = (column[seen_by_none] for column in (gap, batch.weight, batch.probability))
        accuracy = _accuracy(gap, weight, probability)
        z = standard_errors(_agreement(gap, weight, probability), group[seen_by_none])
        self.margin.fill_(_confirmed_margin(gap, weight, probability) if z > CONFIRMED else math.inf)
        loss = pairwise_log_loss((logit[0] - logit[1])[seen_by_none], weight, probability)
        return WinFit(settings, accuracy, loss, z, self.network is not None, network_gain)

    def _set_coordinates(self, batch: PairBatch) -> None:
        both = torch.cat([batch.chosen, batch.rejected])
        self.mean.copy_(both.mean(0))
        centred = both - self.mean
        self.scale.copy_(centred.square().sum(1).mean().sqrt().clamp_min(1e-12))
        self.spread.copy_(centred.square().mean(0).sqrt().clamp_min(1e-6 * float(self.scale)))
        centred = centred / self.scale
        values, vectors = torch.linalg.eigh((centred.T @ centred).double() / len(centred))
        leading = values.flip(0)[: self.axes.shape[1]].clamp_min(1e-12)
        self.axes.copy_(vectors.flip(1)[:, : self.axes.shape[1]] / leading.sqrt())
        self.product_mean.zero_()
        self.product_mean.copy_(self._features(both)[1].mean(0))
        if batch.context is not None:
            self.context_mean.copy_(batch.context.mean(0))
            self.context_spread.copy_(batch.context.std(0, correction=0).clamp_min(1e-6))

    def _fit_reference_reward(self, context: Tensor | None, reward: Tensor, fold: Tensor) -> Tensor:
        """Regress the reference's mean reward on the context; give its out-of-fold predictions (N,)."""
        mean = float(reward.mean())
        self.context_weights.zero_()
        if context is None:
            return torch.full_like(reward, mean)
        inputs = (context - self.context_mean).double()
        centred = (reward - mean).double()
        unit = float(inputs.square().sum(1).mean()) or 1.0
        best: tuple[float, float, Tensor] = (
            float(centred.square().mean()),
            math.inf,
            torch.zeros_like(centred),
        )
        numbers = fold.unique().tolist()
        systems = [_normal_equations(inputs[fold != number], centred[fold != number]) for number in numbers]
        for ridge in (10.0, 1.0, 0.1, 0.01):
            loose = torch.zeros_like(centred)
            for number, system in zip(numbers, systems, strict=True):
                part = fold == number
                loose[part] = inputs[part] @ _ridge(system, ridge * unit)
            error = float((centred - loose).square().mean())
            if error < best[0]:
                best = (error, ridge, loose)
        if not math.isinf(best[1]):
            self.context_weights.copy_(_ridge(_normal_equations(inputs, centred), best[1] * unit))
        return (best[2] + mean).float()

    def _fit_network(
        self,
        batch: PairBatch,
        logit: Tensor,
        label: Tensor,
        held_out: Tensor,
        group: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, float]:
        """Fit the network on what the calibrated logits (2, N) leave; keep it if the held-out part confirms it.

        Returns the corrections (2, N) and the held-out gain in log loss, nats an output.
        """
        assert self.network is not None
        inputs = torch.stack([self._inputs(batch.chosen, batch.context), self._inputs(batch.rejected, batch.context)])
        _train_network(self.network, inputs, logit, label, batch.weight, held_out, generator)
        correction = self.network(inputs).squeeze(-1)

        def loss(gain: float) -> Tensor:
            fuller = (logit + gain * correction)[:, held_out]
            each = binary_cross_entropy_with_logits(fuller, label[:, held_out], reduction="none")
            return each.mean(0) * batch.weight[held_out]

        plain = loss(0.0)
        gain = min((0.25, 0.5, 0.75, 1.0), key=lambda gain: float(loss(gain).sum()))
        better = plain - loss(gain)
        confirmed = standard_errors(better, group[held_out]) > CONFIRMED
        accuracy = [
            _accuracy((value[0] - value[1])[held_out], batch.weight[held_out], batch.probability[held_out])
            for value in (logit, logit + gain * correction)
        ]
        # Better calibrated, but a worse order would cost selection more than calibration gains.
        if not confirmed or accuracy[1] < accuracy[0] - 0.01:
            self.drop_network()
            return torch.zeros_like(logit), 0.0
        self.gain.fill_(gain)
        return gain * correction, float(better.sum() / batch.weight[held_out].sum())


@dataclass
class _Problem:
    """Holds the pairwise regression in its two blocks of features, linear and products."""

    linear: Tensor
    products: Tensor
    weight: Tensor
    probability: Tensor

    def solver(self, part: Tensor, product_scale: float) -> PairwiseLogistic:
        rows = self.rows(product_scale)[part]
        return PairwiseLogistic(rows, self.weight[part], self.probability[part])

    def rows(self, product_scale: float) -> Tensor:
        return torch.cat([self.linear, self.products * product_scale], dim=1) if product_scale else self.linear

    def average(self, fits: list[Tensor], settings: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
        """Give the mean weights of both blocks over fits at (penalty, product scale)."""
        linear, products = self.linear.shape[1], self.products.shape[1]
        mean, product_mean = torch.zeros(linear), torch.zeros(products)
        for weights, (_, scale) in zip(fits, settings, strict=True):
            mean += weights[:linear] / len(fits)
            if scale:
                product_mean += weights[linear:] * scale / len(fits)
        return mean, product_mean


def _cross_validate(
    problem: _Problem, fold: Tensor
) -> tuple[list[tuple[float, float]], dict[int, tuple[Tensor, Tensor]]]:
    """Choose the settings (penalty, product scale) of least log loss on left-out prompts.

    Returns the :data:`AVERAGED` best, whose mean predicts left-out prompts better than the best alone does, and for
    each fold the mean weights of their fits on the other folds.
    """
    if len(fold) > CV_PAIRS:  # whole folds thinned alike: every prompt stays in its fold
        keep = torch.arange(len(fold)) % -(-len(fold) // CV_PAIRS) == 0
        problem = _Problem(*(column[keep] for column in vars(problem).values()))
        fold = fold[keep]
    numbers = fold.unique().tolist()
    loss: dict[tuple[float, float], float] = {}
    fits: dict[tuple[float, float], list[Tensor]] = {}
    for scale in PRODUCT_SCALES:
        rows = problem.rows(scale)
        for number in numbers:
            part = fold == number
            solver = problem.solver(~part, scale)
            for penalty in PENALTIES:
                weights = solver.fit(penalty)
                total = pairwise_log_loss(rows[part] @ weights, problem.weight[part], problem.probability[part])
                setting = penalty, scale
                loss[setting] = loss.get(setting, 0.0) + total * float(problem.weight[part].sum())
                fits.setdefault(setting, []).append(weights)
    best = sorted(loss, key=lambda setting: loss[setting])[:AVERAGED]
    return best, {
        number: problem.average([fits[setting][place] for setting in best], best)
        for place, number in enumerate(numbers)
    }


def _folds(group: Tensor, generator: torch.Generator) -> Tensor:
    """Deal the prompts (pairs, when there is one prompt) into folds; give each pair's fold (N,)."""
    names, member = torch.unique(group, return_inverse=True)
    if len(names) < 2:
        names, member = torch.arange(len(group)), torch.arange(len(group))
    place = torch.randperm(len(names), generator=generator) % min(FOLDS, max(len(names), 1))
    return place[member]


def _normal_equations(inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return inputs.T @ inputs / len(inputs), inputs.T @ target / len(inputs)


def _ridge(system: tuple[Tensor, Tensor], penalty: float) -> Tensor:
    gram, cross = system
    gram = gram.clone()
    gram.diagonal().add_(penalty / len(gram))
    return torch.linalg.solve(gram, cross)


def _train_network(
    network: nn.Sequential,
    inputs: Tensor,
    logit: Tensor,
    label: Tensor,
    weight: Tensor,
    held_out: Tensor,
    generator: torch.Generator,
    updates: int = 1500,
    rows: int = 512,
) -> None:
    """Fit the network to the logits' errors by AdamW with early stopping on the held-out pairs, in place."""
    seed = int(torch.randint(2**31, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        for module in network:
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        last = network[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        train = (~held_out).nonzero().flatten()
        if len(train) == 0 or not bool(held_out.any()):
            return
        check = held_out.nonzero().flatten()[:4096]
        optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=1e-2, fused=True)
        best, kept, patience = math.inf, {}, 0
        for update in range(updates):
            if update % 50 == 0:
                with torch.no_grad():
                    value = network(inputs[:, check]).squeeze(-1) + logit[:, check]
                    each = binary_cross_entropy_with_logits(value, label[:, check], reduction="none")
                    loss = float((each * weight[check]).mean())
                if loss < best:
                    best, patience = loss, 0
                    kept = {name: value.detach().clone() for name, value in network.state_dict().items()}
                else:
                    patience += 1
                    if patience >= 10:
                        break
            for group in optimizer.param_groups:
                group["lr"] = 4e-3 * (1 + math.cos(math.pi * update / updates)) / 2
            some = train[torch.randint(len(train), (rows // 2,), generator=generator)]
            value = network(inputs[:, some]).squeeze(-1) + logit[:, some]
            each = binary_cross_entropy_with_logits(value, label[:, some], reduction="none")
            optimizer.zero_grad()
            (each * weight[some]).mean().backward()
            optimizer.step()
        network.load_state_dict(kept)


def _accuracy(gap: Tensor, weight: Tensor, probability: Tensor) -> float:
    """Give the weighted share of pairs whose order agrees with the label, ties half."""
    return float(0.5 + 0.5 * (_agreement(gap, weight, probability)).sum() / weight.sum())


def _agreement(gap: Tensor, weight: Tensor, probability: Tensor) -> Tensor:
    return (2 * probability - 1) * torch.sign(gap) * weight


def _confirmed_margin(gap: Tensor, weight: Tensor, probability: Tensor, bins: int = 10) -> float:
    """Give the smallest difference in b from which on every larger one is right more often than not.

    The pairs are cut into equally filled bins of |gap|; from the largest gaps downwards, bins are taken as long
    as the label agrees with the order more often than it disagrees.
    """
    order = gap.abs().argsort(descending=True)
    excess = _agreement(gap, weight, probability)[order]
    size = gap.abs()[order]
    margin = math.inf
    for part, level in zip(excess.chunk(bins), size.chunk(bins), strict=True):
        if float(part.sum()) <= 0:
            return margin
        margin = float(level[-1])
    return 0.0
