"""The units and origins of the columns of outputs and contexts do not matter, to any model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pfm import EncodedPairs, FlowConfig, PreferenceFlow
from pfm._internal.columns import column_statistics
from pfm.flow.win import WinHead
from pfm.preferences import (
    BradleyTerry,
    GeneralPreference,
    HybridPreference,
    PreferenceEnsemble,
    RelevancePreference,
    ViewPreference,
    corrected,
)
from pfm.preferences.base import load
from pfm.preferences.coordinates import Coordinates, component_axes
from pfm.preferences.logistic import PairwiseLogistic

COLUMNS, CONTEXTS = 6, 3
# Powers of two change no digit of a float32, so that even the training of a network takes the same course.
POWERS = 2.0 ** torch.tensor([-20, -7, 0, 3, 13, 20])
UNITS = torch.tensor([1e-6, 3e-3, 1.0, 7.0, 2e3, 1e6])
ORIGINS = torch.tensor([-2.0, 0.0, 3.0, 1.0, -1.0, 2.0])


def labelled(count: int = 150, *, contexts: bool = True, turning: bool = False, seed: int = 0) -> EncodedPairs:
    """Draw weighted pairs of five a prompt, whose labels follow a reward of columns and, if asked, a cycle."""
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, count, COLUMNS, generator=generator)
    odds = 1.5 * (one - other)[:, 0] - (one - other)[:, 5]
    if turning:
        odds = 3 * (one[:, 1] * other[:, 2] - one[:, 2] * other[:, 1])
    first = (torch.rand(count, generator=generator) < torch.sigmoid(odds))[:, None]
    group = torch.arange(count) // 5
    context = torch.randn(count // 5, CONTEXTS, generator=generator)[group] if contexts else None
    weight = 0.5 + torch.rand(count, generator=generator)
    chosen, rejected = torch.where(first, one, other), torch.where(first, other, one)
    return EncodedPairs(chosen, rejected, context, weight, group=group)


def changed(pairs: EncodedPairs, units: Tensor, origins: Tensor) -> EncodedPairs:
    """Give the columns of outputs and contexts other units and origins."""
    context = None
    if pairs.context_dimension:
        context = pairs.gather(torch.arange(len(pairs))).context
        assert context is not None
        context = _changed(context, units[[5, 0, 2]], origins[[0, 2, 5]])
    chosen, rejected = (_changed(part, units, origins) for part in (pairs.chosen, pairs.rejected))
    return EncodedPairs(chosen, rejected, context, pairs.weight, group=pairs.group)


def _changed(rows: Tensor, units: Tensor, origins: Tensor) -> Tensor:
    return (rows + origins) * units


def scores(model, pairs: EncodedPairs) -> Tensor:
    batch = pairs.gather(torch.arange(len(pairs)))
    return model.score(batch.chosen, batch.rejected, batch.context)


MODELS = {
    "linear": lambda: BradleyTerry(1e-3),
    "general": lambda: GeneralPreference(hidden=0),
    "hybrid": lambda: HybridPreference(hidden=0),
    "view": lambda: ViewPreference(BradleyTerry(1e-3), 1, standardise=True),
    "ensemble": lambda: PreferenceEnsemble([BradleyTerry(1e-3), GeneralPreference(1, hidden=0)], folds=2),
}
NETWORKS = {
    "bradley_terry": lambda: BradleyTerry(1e-3, hidden=8),
    "general": lambda: GeneralPreference(1, hidden=8),
}


@pytest.mark.parametrize("name", MODELS)
def test_preference_models_do_not_depend_on_units_and_origins(name):
    pairs = labelled()
    other = changed(pairs, UNITS, ORIGINS)
    plain, there = (scores(MODELS[name]().fit(part), part) for part in (pairs, other))
    assert float(plain.abs().mean()) > 0.3
    torch.testing.assert_close(there, plain, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_preference_models_do_not_depend_on_units(name):
    pairs = labelled(turning=name != "bradley_terry")
    plain, there = (NETWORKS[name]().fit(part) for part in (pairs, changed(pairs, POWERS, 0 * ORIGINS)))
    assert plain.found["network_gain"] == pytest.approx(there.found["network_gain"], rel=1e-3, abs=1e-6)
    batch, other = pairs, changed(pairs, POWERS, 0 * ORIGINS)
    torch.testing.assert_close(scores(there, other), scores(plain, batch), rtol=1e-3, atol=1e-3)


def test_b_and_flow_do_not_depend_on_units_and_origins():
    pairs = labelled()
    other = changed(pairs, UNITS, ORIGINS)
    config = FlowConfig(residual=False, validation_share=0.3)
    plain, there = (PreferenceFlow.fit(part, config, progress=False) for part in (pairs, other))
    batch, moved = (part.gather(torch.arange(100)) for part in (pairs, other))
    torch.testing.assert_close(
        there.win_probability(moved.rejected, moved.context), plain.win_probability(batch.rejected, batch.context),
        rtol=0, atol=5e-3,
    )  # fmt: skip
    carried = plain.transport(batch.rejected, batch.context)
    assert float((carried - batch.rejected).norm(dim=1).mean()) > 0.3
    back = there.transport(moved.rejected, moved.context) / UNITS - ORIGINS
    torch.testing.assert_close(back, carried, rtol=0, atol=5e-3)


def test_residual_and_network_of_b_do_not_depend_on_units():
    pairs = labelled()
    config = FlowConfig(hidden=16, layers=2, epochs=3, validation_share=0.3)
    flows = [PreferenceFlow.fit(p, config, progress=False) for p in (pairs, changed(pairs, POWERS, 0 * ORIGINS))]
    assert flows[0].metadata["training"]["loss"] == pytest.approx(flows[1].metadata["training"]["loss"], rel=1e-4)
    found = [flow.metadata["win"] for flow in flows]
    assert found[0]["network_gain"] == pytest.approx(found[1]["network_gain"], rel=1e-3, abs=1e-6)
    assert found[0]["log_loss"] == pytest.approx(found[1]["log_loss"], rel=1e-4)


def test_one_column_a_hundred_times_the_others_costs_b_no_order():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 2000, 8, generator=generator)
    first = ((chosen - rejected)[:, 1:4].sum(1) > 0)[:, None]
    chosen, rejected = torch.where(first, chosen, rejected), torch.where(first, rejected, chosen)
    y = torch.randn(2000, 8, generator=generator)
    order = []
    for size in (1.0, 100.0):
        units = torch.ones(8)
        units[0] = size
        head = WinHead(8, 0)
        head.fit(EncodedPairs(chosen * units, rejected * units), network=False)
        b, truth = head(y * units, None), y[:, 1:4].sum(1)
        order.append(float(((b[:1000] > b[1000:]) == (truth[:1000] > truth[1000:])).float().mean()))
    assert min(order) > 0.985
    assert abs(order[0] - order[1]) <= 0.002


def test_a_rate_beside_a_salary_is_learned_and_shuffled_labels_are_not():
    generator = torch.Generator().manual_seed(0)
    salary = 50_000 + 20_000 * torch.randn(2, 1000, generator=generator)
    rate = 0.05 + 0.01 * torch.randn(2, 1000, generator=generator)
    one, other = torch.stack([salary, rate], dim=-1)
    first = (one[:, 1] > other[:, 1])[:, None]
    pairs = EncodedPairs(torch.where(first, one, other), torch.where(first, other, one))
    assert float((scores(BradleyTerry().fit(pairs), pairs) > 0).float().mean()) > 0.99
    assert float((scores(BradleyTerry().fit(pairs.shuffle_labels()), pairs) > 0).float().mean()) < 0.9


def test_corrected_labels_do_not_depend_on_units():
    pairs = labelled().flip_labels(0.2)
    plain, there = (corrected(part, 0.2) for part in (pairs, changed(pairs, UNITS, ORIGINS)))
    assert float((plain.report.correct - 0.8).abs().max()) > 0.1
    torch.testing.assert_close(there.report.correct, plain.report.correct, rtol=0, atol=5e-3)


def test_statistics_are_weighted_and_only_constant_columns_are_constant():
    rows = torch.tensor([[1.0, 2.0, 1e-9], [3.0, 2.0, 3e-9], [3.0, 2.0, 3e-9], [1e9, 1e9, 1e9]])
    mean, spread = column_statistics(rows, torch.tensor([1.0, 1.0, 2.0, 0.0]))
    assert mean.tolist() == pytest.approx([2.5, 2.0, 2.5e-9])
    assert spread.tolist() == pytest.approx([math.sqrt(0.75), math.inf, math.sqrt(0.75) * 1e-9])
    coordinates = Coordinates(3)
    coordinates.fit(rows[:3])
    linear, _ = coordinates(rows[:3])
    assert linear[:, 1].tolist() == [0.0, 0.0, 0.0]
    assert float(linear.square().sum(1).mean()) == pytest.approx(1.0)
    torch.testing.assert_close(linear[:, 0], linear[:, 2])


def test_the_similarity_of_a_relevance_preference_keeps_its_share_of_the_penalty():
    generator = torch.Generator().manual_seed(0)
    pairs = labelled()
    context = torch.randn(len(pairs), CONTEXTS, generator=generator)
    pairs = EncodedPairs(pairs.chosen, pairs.rejected, context, group=pairs.group)
    for share in (0.1, 1.0):
        model = RelevancePreference(BradleyTerry(1e-3), share).fit(pairs)
        batch = pairs.gather(torch.arange(len(pairs)))
        assert batch.context is not None
        near = [(part[:, :CONTEXTS] * batch.context).sum(1, keepdim=True) for part in (batch.chosen, batch.rejected)]
        one, other = (torch.cat(rows, 1) for rows in zip((batch.chosen, batch.rejected), near, strict=True))
        mean, spread = column_statistics(torch.cat([one, other]))
        # By hand: every column in its own unit, the last one share * sqrt(D) times as wide, and all of unit length.
        wide = torch.cat([torch.ones(COLUMNS), torch.tensor([share * math.sqrt(COLUMNS)])])
        rows = [((part - mean) / spread * wide / wide.norm()).float() for part in (one, other)]
        by_hand = (rows[0] - rows[1]) @ PairwiseLogistic(rows[0] - rows[1]).fit(1e-3, 100)
        torch.testing.assert_close(scores(model, pairs), by_hand, rtol=1e-3, atol=1e-3)


def test_coordinates_saved_with_one_scale_for_all_columns_load(tmp_path):
    model = HybridPreference(hidden=0).fit(labelled(contexts=False))
    y = torch.randn(5, COLUMNS)
    model.coordinates.scale.fill_(2.0)
    expected = model.score(y, -y)
    folder = model.save(tmp_path / "model")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "preference.safetensors")
    tensors["coordinates.scale"] = torch.tensor(2.0)
    save_file(tensors, folder / "preference.safetensors")
    torch.testing.assert_close(load(folder).score(y, -y), expected)


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)])
def test_component_axes_are_those_of_numpy(shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 3, shape[1])
    axes = component_axes(rows, 3)
    centred = rows - rows.mean(0)
    _, singular, right = torch.linalg.svd(centred, full_matrices=False)
    expected = right[:3].T * (math.sqrt(shape[0]) / singular[:3])
    torch.testing.assert_close((axes * expected.sign()).abs(), expected.abs(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((centred @ axes).square().mean(0), torch.ones(3), rtol=1e-4, atol=1e-4)
