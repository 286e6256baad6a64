"""General preferences: cycles, a dominant winner above one, skew-symmetry, calibration, saving, bad input."""

import json
from pathlib import Path

import pytest
import torch
from support.made_once import made_once
from support.rounding import assert_same

from pfm import EncodedPairs
from pfm.preferences import (
    BradleyTerry,
    GeneralPreference,
    HybridPreference,
    MeanShift,
    PreferenceEnsemble,
    PreferenceModel,
    RelevancePreference,
    ViewPreference,
    calibration,
    check_table,
    load,
    reliability,
)
from pfm.preferences.calibration import pair_scores
from pfm.preferences.planes import SkewMoments, skew_products, skew_weights, to_planes

CYCLE = torch.tensor([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]])
DOMINANT = torch.full((4, 4), 0.5)
DOMINANT[1:, 1:], DOMINANT[0, 1:], DOMINANT[1:, 0] = CYCLE, 1.0, 0.0
DIMENSION = 24


def centres(number: int) -> torch.Tensor:
    return 10 * torch.linalg.qr(torch.randn(DIMENSION, number, generator=torch.Generator().manual_seed(99)))[0].T


def kinds(count: int, beats: torch.Tensor, seed: int, contexts: bool = False) -> EncodedPairs:
    """Draw outputs of several kinds, with content that a pair shares and noise, labelled by their kinds alone."""
    generator = torch.Generator().manual_seed(seed)
    number = len(beats)
    one = torch.randint(number, (count,), generator=generator)
    other = (one + torch.randint(1, number, (count,), generator=generator)) % number
    content = 2 * torch.randn(count, DIMENSION, generator=generator)
    y, y_other = (
        centres(number)[kind] + content + torch.randn(count, DIMENSION, generator=generator) for kind in (one, other)
    )
    context = None
    chance = beats[one, other]
    if contexts:  # the same kinds, and in half of the prompts the cycle runs the other way
        context = torch.randn(count, 6, generator=generator)
        chance = torch.where(context[:, 0] > 0, chance, 1 - chance)
    first = (torch.rand(count, generator=generator) < chance)[:, None]
    return EncodedPairs(torch.where(first, y, y_other), torch.where(first, y_other, y), context)


def accuracy(model, pairs: EncodedPairs) -> float:
    return float((pair_scores(model, pairs) > 0).double().mean())


def _fit_all(folder: Path) -> None:
    pairs = kinds(2000, CYCLE, seed=0)
    GeneralPreference(hidden=32).fit(pairs).save(folder / "general")
    GeneralPreference(hidden=0).fit(pairs).save(folder / "closed")
    BradleyTerry().fit(pairs).save(folder / "linear")
    MeanShift().fit(pairs).save(folder / "shift")
    HybridPreference().fit(kinds(2500, DOMINANT, seed=0)).save(folder / "hybrid")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = made_once(tmp_path_factory, "general_preferences", _fit_all)
    return {name: load(folder / name) for name in ("general", "closed", "linear", "shift")}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> PreferenceModel:
    return load(made_once(tmp_path_factory, "general_preferences", _fit_all) / "hybrid")


# -- what they can express ----------------------------------------------------------------------------------------


def test_a_cycle_is_learned_by_planes_and_is_a_coin_to_a_reward(fitted):
    held = kinds(3000, CYCLE, seed=1)
    assert accuracy(fitted["general"], held) >= 0.99
    assert accuracy(fitted["closed"], held) >= 0.96  # the closed form alone
    assert accuracy(fitted["linear"], held) < 0.6
    assert fitted["general"].found["network"]
    assert fitted["general"].found["accuracy"] >= 0.98


def test_a_dominant_winner_above_a_cycle_is_right_on_both(hybrid):
    held = kinds(4000, DOMINANT, seed=1)
    score = pair_scores(hybrid, held)
    dominant = torch.cdist(held.chosen, centres(4)).argmin(1) == 0
    assert 0.4 < float(dominant.double().mean()) < 0.6
    assert float((score[dominant] > 0).double().mean()) >= 0.99
    assert float((score[~dominant] > 0).double().mean()) >= 0.99


def test_a_cycle_of_few_features_among_many_is_found():
    """Three of 90 numbers say of which kind an output is; the leading planes of all of them are planes of noise."""
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(3, (1500,), generator=generator)
    other = (one + torch.randint(1, 3, (1500,), generator=generator)) % 3
    y, y_other = (torch.randn(1500, 90, generator=generator) for _ in range(2))
    for outputs, kind in ((y, one), (y_other, other)):
        outputs[:, [20, 50, 80]] = 0.25 * outputs[:, [20, 50, 80]] + torch.eye(3)[kind]
    first = ((other - one) % 3 == 1)[:, None]
    pairs = EncodedPairs(torch.where(first, y, y_other), torch.where(first, y_other, y))
    train, held = pairs.select(torch.arange(900)), pairs.select(torch.arange(900, 1500))
    model = GeneralPreference(hidden=16).fit(train)
    assert model.found["few_features"]
    assert accuracy(model, held) > 0.93
    moments = SkewMoments(train.chosen, train.rejected, torch.ones(900), torch.ones(900))
    axes = moments.features(torch.ones(900, dtype=torch.bool), 3)
    assert sorted(axes.abs().argmax(0).tolist()) == [20, 50, 80]
    assert (axes != 0).sum() == 3
    shuffled = GeneralPreference(hidden=0).fit(train.shuffle_labels())
    assert 0.4 < accuracy(shuffled, held) < 0.6


def test_relevance_to_the_prompt_is_seen_where_no_reward_of_the_output_is(tmp_path):
    generator = torch.Generator().manual_seed(0)
    y, other = (torch.randn(1200, 12, generator=generator) for _ in range(2))
    context = torch.randn(1200, 8, generator=generator)
    first = (((y - other)[:, :8] * context).sum(1) > 0)[:, None]
    pairs = EncodedPairs(torch.where(first, y, other), torch.where(first, other, y), context)
    train, held = pairs.select(torch.arange(800)), pairs.select(torch.arange(800, 1200))
    plain, model = BradleyTerry(1e-3).fit(train), RelevancePreference(BradleyTerry(1e-3)).fit(train)
    assert abs(accuracy(plain, held) - 0.5) < 0.1
    assert accuracy(model, held) > 0.95
    again = load(model.save(tmp_path))
    assert_same(pair_scores(again, held), pair_scores(model, held))
    table = again.table(y[:5], context[0])
    torch.testing.assert_close(table[0, 1:], again.score(y[:1], y[1:5], context[0]))
    with pytest.raises(ValueError, match=r"context \(B, 8\) is missing"):
        model.score(y, other)
    without = EncodedPairs(train.chosen, train.rejected)
    alone = RelevancePreference(BradleyTerry(1e-3)).fit(without)
    assert alone.context_dimension == 0
    assert_same(alone.score(y, other), BradleyTerry(1e-3).fit(without).score(y, other))
    both = PreferenceEnsemble([BradleyTerry(1e-3), RelevancePreference(BradleyTerry(1e-3))]).fit(train)
    assert accuracy(both, held) > 0.95
    with pytest.raises(ValueError, match="share must be a positive number"):
        RelevancePreference(BradleyTerry(), share=0.0)


def test_a_standardised_view_does_not_depend_on_units():
    pairs = kinds(400, DOMINANT, seed=0)
    units = torch.logspace(-0.5, 0.5, DIMENSION)
    scaled = EncodedPairs(pairs.chosen * units, pairs.rejected * units)
    view = ViewPreference(BradleyTerry(1e-2), start=4, stop=20, standardise=True)
    there, back = (pair_scores(view.fit(some), some) for some in (pairs, scaled))
    torch.testing.assert_close(there, back, atol=0.02, rtol=0.02)


@pytest.mark.slow
def test_the_prompt_turns_the_cycle_round():
    model = GeneralPreference(blocks=3, hidden=32).fit(kinds(4000, CYCLE, seed=2, contexts=True))
    held = kinds(2000, CYCLE, seed=3, contexts=True)
    assert accuracy(model, held) >= 0.9
    y, context = held.chosen[:40], held.context
    assert context is not None
    given = model.score(y, held.rejected[:40], context[:40])
    torch.testing.assert_close(given[3:4], model.score(y[3:4], held.rejected[3:4], context[3]), atol=1e-4, rtol=1e-4)
    wins = model.win_probability(y, held.rejected[:7], context[:40])
    each = torch.stack([torch.sigmoid(model.score(y, held.rejected[i : i + 1], context[:40])) for i in range(7)])
    torch.testing.assert_close(wins, each.mean(0), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"context \(B, 6\) is missing"):
        model.score(y, y)


def test_shuffled_labels_teach_nothing():
    model = HybridPreference(hidden=32).fit(kinds(800, CYCLE, seed=0).shuffle_labels())
    chance = torch.sigmoid(pair_scores(model, kinds(1000, CYCLE, seed=1)))
    assert float((chance - 0.5).abs().mean()) < 0.1
    assert not model.found["network"]
    assert model.found["log_loss"] > 0.66


def test_swapped_labels_turn_every_score_round(fitted):
    held = kinds(500, CYCLE, seed=1)
    there = pair_scores(fitted["closed"], held)
    back = pair_scores(GeneralPreference(hidden=0).fit(kinds(2000, CYCLE, seed=0).swap()), held)
    torch.testing.assert_close(back, -there, atol=0.02 * float(there.abs().max()), rtol=0)


def test_a_reward_alone_is_left_to_the_reward():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(8, generator=generator)
    y, other = torch.randn(2, 3000, 8, generator=generator)
    first = (torch.rand(3000, generator=generator) < torch.sigmoid((y - other) @ weights))[:, None]
    pairs = EncodedPairs(torch.where(first, y, other), torch.where(first, other, y))
    train, held = pairs.split(0.3)
    linear = calibration(BradleyTerry(1e-5).fit(train), held)
    model = HybridPreference(hidden=0).fit(train)
    found = calibration(model, held)
    assert found.accuracy > linear.accuracy - 0.01
    assert found.log_loss < linear.log_loss + 0.01
    assert model.found["planes"] == 0


@pytest.mark.slow
def test_a_unit_embedding_learns_the_cycle_too():
    model = GeneralPreference(hidden=32, normalise=True, temperature=0.1).fit(kinds(2000, CYCLE, seed=0))
    assert model.found["network"]
    assert accuracy(model, kinds(2000, CYCLE, seed=1)) >= 0.985


def test_a_network_gives_bradley_terry_what_is_not_linear():
    generator = torch.Generator().manual_seed(0)
    y, other = torch.randn(2, 3000, 3, generator=generator)
    first = (other.norm(dim=1) < y.norm(dim=1))[:, None]
    pairs = EncodedPairs(torch.where(first, y, other), torch.where(first, other, y))
    train, held = pairs.split(0.2)
    assert accuracy(BradleyTerry().fit(train), held) < 0.6
    assert accuracy(BradleyTerry(hidden=32).fit(train), held) > 0.9


# -- exactness ----------------------------------------------------------------------------------------------------


def test_scores_are_skew_and_probabilities_sum_to_one(fitted, hybrid):
    y, other = 5 * torch.randn(2, 9, DIMENSION, generator=torch.Generator().manual_seed(0))
    for model in (*fitted.values(), hybrid):
        assert torch.equal(model.score(y, other), -model.score(other, y))
        table = model.table(y)
        assert torch.equal(table, -table.T)
        torch.testing.assert_close(table[:, 2], model.score(y, y[2:3].expand(9, -1)), atol=1e-4, rtol=1e-4)
        wins = model.win_probability(y, other)
        back = model.win_probability(other, y)
        assert float(wins.mean() + back.mean()) == pytest.approx(1, abs=1e-6)
        own = model.win_probability(y, other.expand(9, 9, DIMENSION))
        torch.testing.assert_close(own, wins, atol=1e-5, rtol=0)
        order = torch.randperm(9)
        torch.testing.assert_close(model.win_probability(y[order], other), wins[order], atol=1e-5, rtol=0)


def test_planes_give_back_the_form_they_are_made_of():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(15, generator=generator)
    matrix = skew_weights(weights, 6)
    u, other = torch.randn(2, 40, 6, generator=generator)
    exact = (u @ matrix * other).sum(1)
    torch.testing.assert_close(skew_products(u, other) @ weights, exact, atol=1e-4, rtol=1e-4)
    planes = to_planes(matrix, u.T @ u / len(u), 3)
    one, two = u @ planes, other @ planes
    score = (one[:, 0::2] * two[:, 1::2] - one[:, 1::2] * two[:, 0::2]).sum(1)
    torch.testing.assert_close(score, exact, atol=1e-4, rtol=1e-4)
    assert to_planes(matrix, u.T @ u / len(u), 1).shape == (6, 2)
    assert to_planes(torch.zeros(6, 6), torch.eye(6), 3).shape == (6, 0)


def test_the_skew_moment_finds_the_plane_of_a_cycle():
    pairs = kinds(4000, CYCLE, seed=5)
    both = torch.cat([pairs.chosen, pairs.rejected])
    chosen, rejected = pairs.chosen - both.mean(0), pairs.rejected - both.mean(0)
    ones = torch.ones(len(pairs))
    axes = SkewMoments(chosen, rejected, ones, ones).axes(ones > 0, 0.03, 2)
    kind = torch.cdist(pairs.chosen, centres(3)).argmin(1)
    u = chosen @ axes
    means = torch.stack([u[kind == k].mean(0) for k in range(3)])
    within = torch.stack([u[kind == k].std(0) for k in range(3)]).max()
    assert float(torch.pdist(means).min() / within) > 3


# -- calibration --------------------------------------------------------------------------------------------------


def test_reliability_of_known_chances():
    generator = torch.Generator().manual_seed(0)
    score = 2 * torch.randn(40_000, generator=generator)
    label = (torch.rand(40_000, generator=generator) < torch.sigmoid(score)).float()
    right = reliability(score, label)
    assert right.ece < 0.01
    assert sum(part.pairs for part in right.bins) == 40_000
    overdone = reliability(3 * score, label)
    assert overdone.ece > 0.1
    assert overdone.log_loss > right.log_loss
    assert overdone.accuracy == pytest.approx(right.accuracy)
    assert json.loads(json.dumps(right.to_dict()))["ece"] == right.ece
    assert "confidence" in str(right)
    coin = reliability(torch.zeros(4), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert (coin.accuracy, coin.ece) == (0.5, 0.0)


def test_calibration_takes_back_certainty_and_an_ensemble_is_calibrated():
    generator = torch.Generator().manual_seed(1)
    y, other = torch.randn(2, 900, 30, generator=generator)
    weights = torch.randn(30, generator=generator) / 4
    first = (torch.rand(900, generator=generator) < torch.sigmoid((y - other) @ weights))[:, None]
    pairs = EncodedPairs(torch.where(first, y, other), torch.where(first, other, y))
    train, rest = pairs.split(0.6, seed=0)
    tuning, held = rest.split(0.6, seed=1)
    model = BradleyTerry(1e-6).fit(train)
    before, order = calibration(model, held), pair_scores(model, held)
    after = calibration(model.calibrate(tuning), held)
    assert after.log_loss < before.log_loss
    assert after.accuracy == before.accuracy
    assert torch.equal(pair_scores(model, held) > 0, order > 0)
    both = PreferenceEnsemble([BradleyTerry(1e-6), MeanShift()]).fit(pairs.select(torch.arange(540)))
    found = calibration(both, pairs.select(torch.arange(540, 900)))
    assert found.ece < 0.1
    assert found.log_loss < before.log_loss
    assert min(both.found["weights"]) >= 0
    scores = both.member_scores(y[:5], other[:5])
    assert scores.shape == (sum(weight > 0 for weight in both.found["weights"]), 5)
    shares = (both.shares / both.shares.sum()).cpu()
    torch.testing.assert_close((shares[:, None] * scores).sum(0), both.score(y[:5], other[:5]), atol=1e-4, rtol=1e-4)


# -- saving -------------------------------------------------------------------------------------------------------


def test_models_are_saved_and_loaded(tmp_path):
    y, other = torch.randn(2, 5, DIMENSION)
    models = [
        GeneralPreference(hidden=8), GeneralPreference(hidden=0), BradleyTerry(), MeanShift(), HybridPreference(),
        PreferenceEnsemble([BradleyTerry(), MeanShift()], folds=2),
    ]  # fmt: skip
    for number, model in enumerate(models):
        model.fit(kinds(300, CYCLE, seed=0))
        again = load(model.save(tmp_path / str(number)))
        assert type(again) is type(model)
        assert again.found == model.found
        assert again.settings() == model.settings()
        assert_same(again.score(y, other), model.score(y, other))
    (tmp_path / "0" / "preference.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="damaged preference model"):
        load(tmp_path / "0")
    described = json.loads((tmp_path / "1" / "preference.json").read_text()) | {"kind": "Oracle"}
    (tmp_path / "1" / "preference.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"kind must be one of .*HybridPreference.*got 'Oracle'"):
        load(tmp_path / "1")
    with pytest.raises(FileNotFoundError, match=r"preference\.json"):
        load(tmp_path / "none")


# -- bad input ----------------------------------------------------------------------------------------------------


def test_a_table_that_is_not_skew_is_refused():
    odds = check_table([[0.5, 0.9], [0.1, 0.5]])
    torch.testing.assert_close(odds, torch.tensor([[0, 2.1972], [-2.1972, 0]]).double(), atol=1e-3, rtol=0)
    assert torch.equal(check_table([[0.0, 2.0], [-2.0, 0.0]]), torch.tensor([[0.0, 2.0], [-2.0, 0.0]]).double())
    for table, told in (
        ([[0.5, 0.9], [0.3, 0.5]], r"not skew: P\(i > j\) \+ P\(j > i\) = 1 fails at \(0, 1\).*0\.9 and 0\.3"),
        ([[0.0, 2.0], [-1.0, 0.0]], r"not skew: s\(i, j\) = -s\(j, i\)"),
        ([[0.0, float("nan")], [1.0, 0.0]], "table must be finite"),
        ([[0.0, 1.0]], "must be square"),
    ):
        with pytest.raises(ValueError, match=told):
            check_table(table)


@pytest.mark.parametrize("model", [BradleyTerry(), MeanShift(), GeneralPreference(), PreferenceEnsemble()])
def test_ties_alone_and_other_shapes_are_refused(model):
    y, other = torch.randn(2, 20, 3)
    with pytest.raises(ValueError, match="all 20 pairs are ties"):
        model.fit(EncodedPairs(y, other, probability=torch.full((20,), 0.5)))
    with pytest.raises(ValueError, match="validation must have the training pairs' event_shape"):
        model.fit(EncodedPairs(y, other), EncodedPairs(y[:, :2], other[:, :2]))
    with pytest.raises(TypeError, match="pairs must be EncodedPairs: got list"):
        model.fit([1, 2])
    with pytest.raises(RuntimeError, match="not fitted"):
        model.table(y)


def test_bad_arguments_are_named(fitted):
    y = torch.randn(4, DIMENSION)
    model = fitted["general"]
    for call, told in (
        (lambda: model.score(torch.full((4, DIMENSION), float("nan")), y), "y must be finite"),
        (lambda: model.score(y, y[:, :5]), f"other must have {DIMENSION} values a row: got 5"),
        (lambda: model.score(y, y[:3]), "equally many outputs: got 4 and 3"),
        (lambda: model.win_probability(y, y[:0]), "opponents holds no outputs"),
        (lambda: GeneralPreference(0), "blocks must be a whole number of at least 1"),
        (lambda: GeneralPreference(temperature=0.0), "temperature must be a positive number: got 0.0"),
        (lambda: BradleyTerry(hidden=-1), "hidden must be a whole number"),
        (lambda: PreferenceEnsemble([]), "members holds no models"),
        (lambda: PreferenceEnsemble(folds=1), "folds must be a whole number of at least 2"),
        (lambda: reliability(torch.zeros(0)), "N >= 1"),
    ):
        with pytest.raises(ValueError, match=told):
            call()
