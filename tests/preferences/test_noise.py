"""Wrong labels: the unbiased loss, how many there are, which ones, and what a fit gains."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid, softplus

from pfm import EncodedPairs
from pfm.preferences import BradleyTerry, corrected, unbiased_label
from pfm.preferences.logistic import PairwiseLogistic
from pfm.preferences.noise import Corrected, _Labels, _with_outputs

PROMPTS, EACH, DIMENSION = 60, 6, 6


def tournament(seed: int = 0, prompts: int = PROMPTS, steepness: float = 6.0) -> tuple[EncodedPairs, torch.Tensor]:
    """Give every pair of each prompt's outputs, labelled by a steep linear reward, and its weights (D,)."""
    generator = torch.Generator().manual_seed(seed)
    weights = steepness * torch.nn.functional.normalize(torch.randn(DIMENSION, generator=generator), dim=0)
    outputs = torch.randn(prompts * EACH, DIMENSION, generator=generator)
    places = torch.triu_indices(EACH, EACH, 1)
    one, other = ((EACH * torch.arange(prompts)[:, None] + place).flatten() for place in places)
    reward = outputs @ weights
    first = torch.rand(len(one), generator=generator) < torch.sigmoid(reward[one] - reward[other])
    pairs = EncodedPairs.from_table(
        outputs, torch.where(first, one, other), torch.where(first, other, one), group=one // EACH
    )
    return pairs, weights


@pytest.fixture(scope="module")
def clean() -> EncodedPairs:
    return tournament()[0]


@pytest.fixture(scope="module")
def noisy(clean: EncodedPairs) -> tuple[EncodedPairs, torch.Tensor]:
    """Give the pairs with a fifth of the labels turned round, and which (N,)."""
    flipped = clean.flip_labels(0.2, seed=1)
    return flipped, turned(clean, flipped)


@pytest.fixture(scope="module")
def found(noisy: tuple[EncodedPairs, torch.Tensor]) -> Corrected:
    return corrected(noisy[0])


def turned(before: EncodedPairs, after: EncodedPairs) -> torch.Tensor:
    return (before.chosen != after.chosen).any(1)


def likeness(pairs: EncodedPairs) -> float:
    """Give the cosine of what is learned with the reward that made the labels."""
    weights = tournament()[1]
    return float(torch.cosine_similarity(BradleyTerry(1e-3).fit(pairs).weights.cpu(), weights, dim=0))


def test_flipping_is_what_shuffling_is_at_one_half_and_is_undone_by_itself(clean: EncodedPairs):
    assert torch.equal(clean.flip_labels(0.5, 3).chosen, clean.shuffle_labels(3).chosen)
    assert not turned(clean, clean.flip_labels(0.0)).any()
    assert torch.equal(clean.flip_labels(1.0).chosen, clean.rejected)
    assert torch.equal(clean.flip_labels(0.3, 5).flip_labels(0.3, 5).chosen, clean.chosen)
    assert float(turned(clean, clean.flip_labels(0.2)).float().mean()) == pytest.approx(0.2, abs=0.03)
    with pytest.raises(ValueError, match="share must lie in"):
        clean.flip_labels(1.1)


# -- the known rate -----------------------------------------------------------------------------------------------


def test_the_unbiased_loss_is_the_logistic_loss_of_a_label_outside_of_the_unit_interval():
    score, rate = torch.linspace(-4, 4, 9), 0.2
    natarajan = ((1 - rate) * -logsigmoid(score) + rate * logsigmoid(-score)) / (1 - 2 * rate)
    label = unbiased_label(torch.ones(9), rate)
    assert label.tolist() == pytest.approx([4 / 3] * 9)
    torch.testing.assert_close(softplus(-score) + (1 - label) * score, natarajan)
    # On the mean over flips it is the loss of the label before them, whatever that was.
    for p in (0.0, 0.3, 1.0):
        turned_round = unbiased_label(torch.tensor([p, 1 - p]), rate)
        assert float((1 - rate) * turned_round[0] + rate * turned_round[1]) == pytest.approx(p, abs=1e-6)


def test_one_pairs_unbiased_loss_has_no_minimum_and_so_is_no_label_of_a_pair_set():
    label = float(unbiased_label(torch.ones(1), 0.2))
    losses = [math.log1p(math.exp(-s)) + (1 - label) * s for s in (1.0, 10.0, 100.0, 1000.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < -300
    with pytest.raises(ValueError, match="probability must lie in"):
        EncodedPairs(torch.ones(1, 2), torch.zeros(1, 2), probability=[label])


def test_the_unbiased_loss_undoes_the_shrinkage_of_a_linear_fit():
    pairs, weights = tournament(1, prompts=1200, steepness=1.5)
    flipped = pairs.flip_labels(0.2)
    difference, label = flipped.chosen - flipped.rejected, torch.ones(len(flipped))
    plain = PairwiseLogistic(difference, None, label).fit(1e-6, 200)
    unbiased = PairwiseLogistic(difference, None, unbiased_label(label, 0.2)).fit(1e-6, 200)
    assert float(plain.norm()) < 0.6 * float(weights.norm())
    assert float(unbiased.norm()) == pytest.approx(float(weights.norm()), rel=0.2)
    assert float(torch.cosine_similarity(plain, weights, dim=0)) > 0.98  # flips shrink what is learned, not turn it


@pytest.mark.parametrize("rate", [-0.1, 0.5, math.nan])
def test_rates_at_which_labels_say_nothing_are_refused(clean: EncodedPairs, rate: float):
    with pytest.raises(ValueError, match="flip_rate must lie in"):
        unbiased_label(torch.ones(1), rate)
    with pytest.raises(ValueError, match="flip_rate must lie in"):
        corrected(clean, rate)


# -- correction ---------------------------------------------------------------------------------------------------


def test_the_share_of_wrong_labels_is_found_and_which_they_are(noisy, found):
    _, wrong = noisy
    report = found.report
    assert report.flip_rate == report.estimate == pytest.approx(0.2, abs=0.05)
    assert report.z > 1.645
    suspected = report.correct < 0.5
    assert float(suspected[wrong].float().mean()) > 0.6
    assert float(suspected[~wrong].float().mean()) < 0.08
    # Of labels that are said to be right with a probability, that share is right.
    assert float(report.correct.mean()) == pytest.approx(float((~wrong).float().mean()), abs=0.05)
    assert "of the labels are flipped" in str(report)


def test_ties_hide_no_wrong_labels(noisy):
    """Twice as many ties as decided labels, none of which says anything of flips, nor does a row of weight zero."""
    pairs, count = noisy[0], len(noisy[0])
    decided = EncodedPairs(pairs.chosen, pairs.rejected, group=pairs.group)
    probability, weight = torch.full((4 * count,), 0.5), torch.ones(4 * count)
    probability[:count], probability[3 * count :], weight[3 * count :] = 1, 0, 0
    tied = EncodedPairs(
        pairs.chosen.repeat(4, 1), pairs.rejected.repeat(4, 1), weight=weight, probability=probability,
        group=pairs.group.repeat(4),
    )  # fmt: skip
    ours, theirs = (corrected(each).report for each in (decided, tied))
    assert ours.flip_rate == pytest.approx(0.2, abs=0.05)
    assert theirs.flip_rate == pytest.approx(ours.flip_rate, abs=1e-3)
    assert theirs.z == pytest.approx(ours.z, rel=1e-2)
    torch.testing.assert_close(theirs.correct[:count], ours.correct, atol=5e-3, rtol=0)
    kept = corrected(tied).pairs.probability
    assert kept is not None
    assert torch.equal(kept[count : 3 * count], torch.full((2 * count,), 0.5))


def test_correction_learns_what_clean_labels_teach(clean, noisy, found):
    plain, ideal = likeness(noisy[0]), likeness(clean)
    assert ideal - plain > 0.005
    for better in (found, corrected(noisy[0], 0.2)):
        assert ideal - likeness(better.pairs) < (ideal - plain) / 3


def test_clean_labels_come_back_as_they_are(clean: EncodedPairs):
    found = corrected(clean)
    assert found.report.flip_rate == 0
    assert found.pairs.probability is None
    assert torch.equal(found.report.correct, torch.ones(len(clean)))
    assert torch.equal(found.pairs.chosen, clean.chosen)
    assert "no flipped labels confirmed" in str(found.report)


def test_shuffled_labels_are_not_made_to_tell_anything(clean: EncodedPairs):
    shuffled = clean.shuffle_labels(2)
    assert corrected(shuffled).report.flip_rate == 0
    # Told that a fifth is wrong, it trusts every label alike: none is known to be wrong.
    told = corrected(shuffled, 0.2)
    assert told.report.correct.tolist() == pytest.approx([0.8] * len(clean), abs=0.05)
    assert abs(likeness(told.pairs)) < 0.9


def test_swapped_labels_are_mirrored(noisy, found):
    other = corrected(noisy[0].swap())
    torch.testing.assert_close(other.report.correct, found.report.correct, atol=0.02, rtol=0)
    assert likeness(other.pairs) == pytest.approx(-likeness(found.pairs), abs=0.01)


def test_soft_labels_weights_and_tables_stay(clean: EncodedPairs):
    index = torch.arange(len(clean))
    soft = EncodedPairs.from_table(
        clean._tables[0], *clean._indices, group=clean.group, weight=1.0 + index % 3,
        probability=torch.where(index % 2 == 0, 0.9, 1.0),
    ).flip_labels(0.2, seed=1)  # fmt: skip
    found = corrected(soft, 0.2)
    assert found.pairs.probability is not None
    assert found.pairs.weight is not None
    assert found.pairs.weight.tolist() == (1.0 + index % 3).tolist()
    assert found.pairs._tables is soft._tables
    assert soft.probability is not None
    certain = (soft.probability - 0.5).abs()
    assert bool(((found.pairs.probability - 0.5).abs() <= certain + 1e-6).all())


def test_raters_are_told_apart_and_one_of_one_label_is_average(clean: EncodedPairs):
    rates = torch.tensor([0.02, 0.2, 0.9])
    rater = torch.arange(len(clean)) % 3
    wrong = torch.rand(len(clean), generator=torch.Generator().manual_seed(4)) < rates[rater] * (rater > 0)
    flipped = clean.select(torch.arange(len(clean)))
    first, second = clean._indices
    flipped._indices = torch.where(wrong, second, first), torch.where(wrong, first, second)
    names = ["careful", "hasty", "contrary"]
    report = corrected(flipped, rater=[*(names[i] for i in rater[:-1].tolist()), "once"]).report
    found = report.raters
    assert found is not None
    assert found.raters == [*names, "once"]
    share = dict(zip(found.raters, found.flip_rate.tolist(), strict=True))
    assert share["careful"] < 0.1 < share["hasty"] < 0.35
    assert share["contrary"] > 0.7
    assert abs(share["once"] - report.estimate) < 0.1  # as the mean of all, whatever its one label was
    assert found.labels.tolist()[-1] == 1


def test_pairs_without_prompts_or_repeated_outputs_can_be_corrected():
    pairs, _ = tournament(prompts=40)
    alone = EncodedPairs(pairs.chosen, pairs.rejected).flip_labels(0.2)
    report = corrected(alone, 0.2).report
    assert report.spread == 0
    assert float(report.correct[turned(pairs, alone)].mean()) < float(report.correct.mean()) - 0.2
    one_pair = corrected(alone.select([0]), 0.2)
    assert one_pair.report.correct.tolist() == pytest.approx([0.8])


def test_bad_input_is_named(clean: EncodedPairs):
    ties = EncodedPairs(clean.chosen, clean.rejected, probability=torch.full((len(clean),), 0.5))
    with pytest.raises(ValueError, match="are ties"):
        corrected(ties)
    with pytest.raises(ValueError, match="rater must have one"):
        corrected(clean, rater=["a"])
    with pytest.raises(TypeError, match="must be EncodedPairs"):
        corrected(clean.chosen)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="at least one entry above zero"):
        EncodedPairs(clean.chosen, clean.rejected, weight=torch.zeros(len(clean)))


def test_a_pair_is_scored_by_the_outputs_other_labels_and_not_by_its_own():
    """Every output has a worth of its own; a pair's score must not move when its own label is turned round."""
    generator = torch.Generator().manual_seed(0)
    worth = 3 * torch.randn(5, generator=generator).repeat(4)
    places = torch.triu_indices(5, 5, 1)
    one, other = ((5 * torch.arange(4)[:, None] + place).flatten() for place in places)
    first = worth[one] > worth[other]
    pairs = EncodedPairs.from_table(
        torch.randn(20, 2, generator=generator), torch.where(first, one, other), torch.where(first, other, one),
        group=one // 5,
    )  # fmt: skip

    def scores(probability: torch.Tensor) -> tuple[torch.Tensor, float]:
        labels = _Labels(probability, torch.ones(40))
        return _with_outputs(pairs, labels, torch.zeros(40), None, torch.Generator().manual_seed(1), [1.0])[:2]

    before, spread = scores(torch.ones(40))
    assert spread == 1.0
    assert float((before > 0).float().mean()) > 0.7
    for pair in (0, 17, 39):
        turned_one = torch.ones(40)
        turned_one[pair] = 0.0
        after, spread = scores(turned_one)
        assert spread == 1.0
        assert float(after[pair]) == pytest.approx(float(before[pair]), abs=1e-6)
        assert float((after - before).abs().max()) > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_labels_by_a_coin_give_no_output_a_worth(seed):
    """What a coin said of a pair would be found again in its outputs' worth if it were fitted and judged by it."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.triu_indices(5, 5, 1)
    one, other = ((5 * torch.arange(8)[:, None] + place).flatten() for place in places)
    first = torch.rand(80, generator=generator) < 0.5
    pairs = EncodedPairs.from_table(
        torch.randn(40, 2, generator=generator), torch.where(first, one, other), torch.where(first, other, one),
        group=one // 5,
    )  # fmt: skip
    labels = _Labels(torch.ones(80), torch.ones(80))
    score, _, _ = _with_outputs(pairs, labels, torch.zeros(80), None, torch.Generator().manual_seed(1), [1.0])
    assert float((score > 0).float().mean()) < 0.65
