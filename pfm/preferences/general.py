"""General preferences, cyclic ones too: embeddings in planes, and a reward beside them.

The General Preference Model (Zhang et al. 2410.02197) embeds an output as v(y|x) in R^2k and compares two by
s = sum over l of lambda_l(x) (v_2l v'_2l+1 - v_2l+1 v'_2l), with strengths lambda from the prompt. Here v is fitted in
parts, each of which held-out prompts must confirm:

1. one plane (r(y), 1) with a linear Bradley-Terry reward r, whose score is r - r': a constant coordinate makes every
   reward a plane;
2. the leading planes of the labels' skew moment (:mod:`pfm.preferences.planes`), or of the few features in which it
   stands out, on which the score is linear again, fitted together with the reward under penalties chosen by
   cross-validation over prompts;
3. k planes of a small network with the strengths lambda(x). It reads the leading components of y and x and the axes
   of the skew moment, not all of an embedding, in which it would find the training prompts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from pfm._internal.checks import check_number, check_seed, check_whole
from pfm._internal.significance import confirmed
from pfm.data.batches import PairBatch
from pfm.data.encoded import EncodedPairs
from pfm.preferences.base import Embedded, PreferenceModel, check_pairs
from pfm.preferences.coordinates import Coordinates, component_axes
from pfm.preferences.correction import Correction, fit_correction
from pfm.preferences.crossvalidation import Search, Setting, deal_folds
from pfm.preferences.logistic import fit_temperature, pairwise_accuracy, pairwise_log_loss, smooth_labels
from pfm.preferences.newton import label_loss
from pfm.preferences.planes import SkewMoments, skew_products, skew_weights, to_planes

__all__ = ["GeneralPreference", "HybridPreference"]

RIDGES = (3.0, 0.3, 0.03)  # in units of the features' mean variance
NETWORK_RIDGE = 0.3
NETWORK_INPUTS = 64  # components of an output that the network reads, beside the axes of the skew moment
FEW_INPUTS: dict[str, Any] = {"updates": 3000, "learning_rate": 4e-3}  # few inputs bear a longer and faster training
PRODUCT_SCALES = (0.0, 0.05, 0.1)
SKEW_SCALE = 0.2
SKEW_PENALTIES = (1e-2, 1e-3, 1e-4)
PRODUCTS_IN_PLANES = 0.3
FIT_PAIRS = 30_000


class GeneralPreference(PreferenceModel):
    """Embeds outputs in planes only (GPM); see the module for its parts.

    The fitted preference may be cyclic: then it has no best output, and only comparisons and the mean chance
    against given opponents are defined.

    Args:
        blocks: number k of planes beside the linear reward's, in the closed part and again in the network.
        hidden: width of the network; 0 for none.
        gate: let the prompt set the strengths of the network's planes.
        normalise: bring the network's v(y|x) to length 1; its scores are then at most 1 / temperature a unit of
            strength.
        temperature: of the network's planes.
        seed: of folds and network.

    >>> import math
    >>> angle = 2 * math.pi / 3 * torch.arange(3)  # rock, paper, scissors
    >>> sign = torch.stack([angle.cos(), angle.sin()], 1).repeat(50, 1)
    >>> model = GeneralPreference(hidden=0).fit(EncodedPairs(sign.roll(-1, 0)[:-1], sign[:-1]))
    >>> (model.table(sign[:3]) > 0).int().tolist()  # row beats column
    [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    """

    _scalar = False  # whether a reward stands beside the planes, with products and a network of its own

    weights: Tensor
    product_weights: Tensor
    planes: Tensor
    slope: Tensor

    def __init__(
        self,
        blocks: int = 4,
        *,
        hidden: int = 64,
        gate: bool = True,
        normalise: bool = False,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        seed = check_seed(seed)
        blocks, hidden = check_whole("blocks", blocks, 1), check_whole("hidden", hidden, 0)
        temperature = check_number("temperature", temperature, above=0)
        super().__init__()
        self.blocks, self.hidden, self.gate = blocks, hidden, gate
        self.normalise, self.temperature, self.seed = normalise, temperature, seed

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return {name: getattr(self, name) for name in ("blocks", "hidden", "gate", "normalise", "temperature", "seed")}

    def _build(self, dimension: int, contexts: int, planes: int, network: dict[str, int] | None) -> None:
        self.dimension, self.context_dimension = dimension, contexts if network else 0
        self.coordinates = Coordinates(dimension)
        features = dimension + self.coordinates.products
        for name, value in {
            "weights": torch.zeros(dimension),
            "product_weights": torch.zeros(self.coordinates.products),
            "planes": torch.zeros(features, 2 * planes),
            "slope": torch.ones(()),
        }.items():
            self.register_buffer(name, value)
        self.network = None if network is None else Correction(features, contexts, **network, **self._shape())

    def _shape(self) -> dict[str, Any]:
        return {
            "hidden": self.hidden, "blocks": self.blocks, "reward": self._scalar, "gate": self.gate,
            "unit": self.normalise, "temperature": self.temperature,
        }  # fmt: skip

    # -- comparing ----------------------------------------------------------------------------------------------

    def embed(self, y: Tensor, context: Tensor | None) -> Embedded:
        """Embed outputs (B, D) under contexts (B, C) or None."""
        linear, products = self.coordinates(y)
        features = _plane_features(linear, products)
        reward, planes = linear @ self.weights + products @ self.product_weights, features @ self.planes
        if self.network is not None:
            more = self.network(features, context)
            reward, planes = reward + more.reward, torch.cat([planes, more.planes], dim=-1)
        if not self._scalar:  # the plane (r, 1) compares as r - r'
            planes = torch.cat([torch.stack([reward, torch.ones_like(reward)], dim=-1), planes], dim=-1)
            reward = torch.zeros_like(reward)
        return Embedded(reward, planes).scaled(self.slope)

    # -- fitting ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(self, pairs: EncodedPairs, validation: EncodedPairs | None = None, *, progress: bool = False) -> Self:
        """Fit all parts, calibrate them on prompts they have not seen, and return the model itself.

        ``found`` then says what was kept: ``planes`` of the closed form, ``network``, ``accuracy`` and ``log_loss``
        (nats a pair) on prompts that no part was fitted on, and the gains in log loss that decided.
        """
        check_pairs(pairs, validation)
        generator = torch.Generator().manual_seed(self.seed)
        index = torch.arange(len(pairs))
        if len(pairs) > FIT_PAIRS:
            index = torch.randperm(len(pairs), generator=generator)[:FIT_PAIRS]
        batch, group = pairs.gather(index), pairs.group[index]
        self._ready(dimension=pairs.dimension, contexts=pairs.context_dimension, planes=0, network=None)
        fold = deal_folds(group, generator)
        score, found = self._fit_closed(batch, group, fold)
        held_out = fold == 0
        if validation is not None:
            held = validation.gather(torch.arange(len(validation)))
            score = torch.cat([score, self.embed(held.chosen, None).against(self.embed(held.rejected, None))])
            batch, group = batch.joined(held), torch.cat([group, validation.group + 1 + int(group.max())])
            held_out = torch.arange(len(group)) >= len(index)
        judged = torch.ones_like(held_out) if validation is None else held_out
        if self.hidden and bool(held_out.any()) and not bool(held_out.all()):
            slope = fit_temperature(score, batch.probability, batch.weight)
            score = slope * score + self._fit_network(slope, slope * score, batch, held_out, group, generator, found)
            judged = held_out if self.network is not None else judged
        weight, probability = batch.weight[judged], batch.probability[judged]
        slope = fit_temperature(score[judged], probability, weight)
        self.slope.fill_(slope)
        score = slope * score[judged]
        self.found = found | {
            "planes": self.planes.shape[1] // 2,
            "network": self.network is not None,
            "accuracy": pairwise_accuracy(score, weight, probability),
            "log_loss": pairwise_log_loss(score, weight, probability),
        }
        return self

    def _fit_closed(self, batch: PairBatch, group: Tensor, fold: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Fit reward and planes; give each pair's score by fits that did not see its prompt, and what was decided."""
        self.coordinates.fit(torch.cat([batch.chosen, batch.rejected]), batch.weight.repeat(2), self._emphasis)
        chosen, rejected = self.coordinates(batch.chosen), self.coordinates(batch.rejected)
        one, other = _plane_features(*chosen), _plane_features(*rejected)
        moments = SkewMoments(one, other, batch.weight, batch.probability)
        width = min(2 * self.blocks, one.shape[1])

        def block(ridge: float) -> Any:
            def rows(part: Tensor) -> Tensor:
                axes = moments.axes(part, ridge, width)
                return skew_products(one @ axes, other @ axes)

            return rows

        def few(part: Tensor) -> Any:
            axes = moments.features(part, width)
            return skew_products(one @ axes, other @ axes)

        search = Search(
            [chosen[0] - rejected[0], chosen[1] - rejected[1], *(block(ridge) for ridge in RIDGES), few],
            batch.weight, batch.probability, fold,
        )  # fmt: skip
        none = (0.0,) * (len(RIDGES) + 1)
        search.over([(scale, *none) for scale in (PRODUCT_SCALES if self._scalar else (0.0,))])
        scalar = search.best()
        product_scale = scalar[0][1]
        places = range(len(none))
        grid = [[SKEW_SCALE if place == number else 0.0 for place in places] for number in places]
        search.over([(product_scale, *scales) for scales in grid], SKEW_PENALTIES)
        turning = search.best(_turns)
        losses = [_losses(search.left_out(settings), batch) for settings in (scalar, turning)]
        gain = losses[0] - losses[1]
        settings = turning if confirmed(gain, group, batch.weight, cross_fitted=True) else scalar
        weights, product_weights, *skew = search.refit(settings)
        self.weights.copy_(weights)
        self.product_weights.copy_(product_weights)
        if settings is turning:
            every = torch.ones_like(fold, dtype=torch.bool)
            axes = [moments.axes(every, ridge, width) for ridge in RIDGES]
            axes = torch.cat([*axes, moments.features(every, width)], dim=1)
            matrix = torch.block_diag(*(skew_weights(part, width) for part in skew))
            both = torch.cat([one, other]) @ axes
            self.planes = axes @ to_planes(matrix, both.T @ both / len(both), self.blocks)
            assert self.layout is not None
            self.layout["planes"] = self.planes.shape[1] // 2
        return search.left_out(settings), {
            "few_features": bool(settings[0][-1]),
            "settings": [list(setting) for setting in settings],
            "plane_gain": float((gain * batch.weight).sum() / batch.weight.sum()),
        }

    def _fit_network(
        self, slope: float, score: Tensor, batch: PairBatch, held_out: Tensor, group: Tensor,
        generator: torch.Generator, found: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """Fit the network beyond the closed part, scaled by ``slope``; give its corrections (N,) of the scores."""
        one, other = (_plane_features(*self.coordinates(part)) for part in (batch.chosen, batch.rejected))
        # The axes are found without the pairs that judge the network.
        moments = SkewMoments(one, other, batch.weight, batch.probability)
        width = min(2 * self.blocks, one.shape[1])
        # A network that reads much finds the training pairs in it, so several are tried, those that read a few features
        # and no context first.
        few, without = moments.features(~held_out, width), replace(batch, context=None)
        turning = moments.axes(~held_out, NETWORK_RIDGE, width)
        components = component_axes(torch.cat([one, other]), NETWORK_INPUTS, batch.weight.repeat(2))
        tries: list[tuple[Tensor, PairBatch, dict[str, Any]]] = [
            (few, without, FEW_INPUTS),
            (torch.cat([components, turning], dim=1), batch, {}),
        ]
        if self._scalar:
            more = torch.cat([few, moments.features(~held_out, width, reward=True)], dim=1)
            tries.insert(1, (more, without, FEW_INPUTS))
        fitted = fit_correction(one, other, tries, score, held_out, group, generator, **self._shape())
        self.weights *= slope
        self.product_weights *= slope
        self.planes *= math.sqrt(slope)
        self.network = fitted.network
        found["network_gain"] = fitted.gain
        if fitted.network is not None:
            assert self.layout is not None
            self.layout |= {"network": fitted.network.sizes, "contexts": fitted.network.context_mean.shape[0]}
            self.context_dimension = self.layout["contexts"]
        return fitted.scores

    def _rescale(self, slope: float) -> None:
        self.slope *= slope


class HybridPreference(GeneralPreference):
    """Puts a scalar reward beside the planes: a dominant winner, and a cycle below it.

    The reward is linear in the output and in the products of its leading components, with penalties chosen on
    left-out prompts, plus a part of the network; the planes are those of :class:`GeneralPreference`, with the same
    arguments.
    """

    _scalar = True


def _plane_features(linear: Tensor, products: Tensor) -> Tensor:
    return torch.cat([linear, PRODUCTS_IN_PLANES * products], dim=-1)


def _turns(setting: Setting) -> bool:
    return any(setting[2:])


def _losses(score: Tensor, batch: PairBatch) -> Tensor:
    """Return each pair's log loss (N,), the scores once calibrated."""
    return label_loss(fit_temperature(score, batch.probability, batch.weight) * score, smooth_labels(batch.probability))
