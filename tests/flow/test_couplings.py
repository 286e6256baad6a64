"""Couplings against closed forms: what they join, in which proportion, and what they refuse."""

import itertools

import pytest
import torch

from pfm import EncodedPairs
from pfm.flow.couplings import COUPLINGS, BestOf, Coupled, Coupling, Joined, WithoutContext, make_coupling


def all_rows(coupling: Coupling) -> Coupled:
    return coupling.draw(torch.arange(len(coupling)), torch.Generator().manual_seed(0))


def contextual(count: int = 60, contexts: int = 6, seed: int = 0) -> EncodedPairs:
    """Draw pairs in the plane; the context's number is also the outputs' second coordinate."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.randint(contexts, (count,), generator=generator).float()
    one, other = torch.rand(2, count, generator=generator)
    chosen = torch.stack([torch.maximum(one, other), number], 1)
    rejected = torch.stack([torch.minimum(one, other), number], 1)
    return EncodedPairs(chosen, rejected, number[:, None])


@pytest.mark.parametrize("source", ["reference", "rejected"])
@pytest.mark.parametrize("name", COUPLINGS)
def test_no_coupling_joins_across_contexts(name: str, source: str):
    rows = all_rows(make_coupling(contextual(), source=source, coupling=name))
    context = rows.row_context()
    assert context is not None
    assert torch.equal(rows.source[:, 1:], context)
    assert torch.equal(rows.target[:, 1:], context)


@pytest.mark.parametrize("source", ["reference", "rejected"])
@pytest.mark.parametrize("name", COUPLINGS)
def test_every_coupling_has_the_same_marginals(name: str, source: str):
    pairs = contextual(1600, contexts=4)
    wanted = all_rows(make_coupling(pairs, source=source, coupling="paired"))
    rows = all_rows(make_coupling(pairs, source=source, coupling=name))
    for ours, theirs in ((rows.source, wanted.source), (rows.target, wanted.target)):
        for power in (1, 2, 3):
            ours_mean = (ours**power * rows.weight[:, None]).sum(0) / rows.weight.sum()
            theirs_mean = (theirs**power * wanted.weight[:, None]).sum(0) / wanted.weight.sum()
            torch.testing.assert_close(ours_mean, theirs_mean, rtol=0.03, atol=0.01)


def test_ot_is_the_assignment_of_least_cost():
    """On the line the optimal transport joins by rank; in the plane it beats every permutation."""
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = torch.randn(2, 50, 1, generator=generator)
    rows = all_rows(make_coupling(EncodedPairs(chosen, rejected), source="rejected", coupling="ot"))
    order = rows.source.flatten().argsort()
    assert torch.equal(rows.target.flatten()[order], chosen.flatten().sort().values)

    chosen, rejected = torch.randn(2, 6, 2, generator=generator)
    rows = all_rows(make_coupling(EncodedPairs(chosen, rejected), source="rejected", coupling="ot"))
    cost = float((rows.source - rows.target).square().sum())
    best = min(float((rejected - chosen[list(order)]).square().sum()) for order in itertools.permutations(range(6)))
    assert cost == pytest.approx(best, rel=1e-5)
    assert cost < float((rejected - chosen).square().sum())


def test_ot_cuts_a_large_context_into_blocks_that_cover_it():
    pairs = EncodedPairs(torch.arange(3000.0)[:, None] + 1, torch.arange(3000.0)[:, None])
    rows = all_rows(make_coupling(pairs, source="rejected", coupling="ot"))
    assert torch.equal(rows.source.flatten().sort().values, torch.arange(3000.0))
    assert torch.equal(rows.target.flatten().sort().values, torch.arange(3000.0) + 1)
    assert float((rows.source - rows.target).abs().mean()) < 60  # any order: 1000


def test_independent_draws_targets_afresh_and_evenly():
    pairs = contextual(600, contexts=2)
    coupling = make_coupling(pairs, source="rejected", coupling="independent")
    generator = torch.Generator().manual_seed(0)
    first = coupling.draw(torch.arange(600), generator).target
    assert not torch.equal(first, coupling.draw(torch.arange(600), generator).target)
    drawn = coupling.draw(torch.zeros(60_000, dtype=torch.long), generator).target[:, 0]
    own = pairs.chosen[pairs.chosen[:, 1] == pairs.chosen[0, 1], 0]
    counts = torch.stack([(drawn == value).sum() for value in own]).float()
    assert float(counts.sum()) == 60_000
    assert float(counts.std() / counts.mean()) < 2 / float(counts.mean()) ** 0.5


@pytest.mark.parametrize("name", ["independent", "ot"])
def test_weights_and_soft_labels_decide_how_often(name: str):
    chosen, rejected = torch.zeros(2, 1), torch.ones(2, 1)
    pairs = EncodedPairs(chosen, rejected, weight=[1.0, 3.0], probability=[1.0, 0.5])
    # Winners: weight 1 on a zero from the first pair; 1.5 on a zero and 1.5 on a one from the second.
    wide = pairs.select(torch.arange(2).repeat(400))
    rows = all_rows(make_coupling(wide, source="rejected", coupling=name))
    share = float((rows.target[:, 0] * rows.weight).sum() / rows.weight.sum())
    assert share == pytest.approx(1.5 / 4, abs=0.05)
    share = float((rows.source[:, 0] * rows.weight).sum() / rows.weight.sum())
    assert share == pytest.approx(2.5 / 4, abs=0.05)


def test_c2ot_joins_near_contexts_and_near_outputs():
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(1500, generator=generator) * 2 * torch.pi
    context = torch.stack([angle.cos(), angle.sin()], 1)
    chosen, rejected = torch.randn(2, 1500, 2, generator=generator)
    pairs = EncodedPairs(chosen + context, rejected, context)
    rows = all_rows(make_coupling(pairs, source="rejected", coupling="c2ot"))
    joined = float((rows.source - rows.target).square().sum(1).mean())
    paired = float((pairs.chosen - pairs.rejected).square().sum(1).mean())
    assert joined < 0.6 * paired
    # The context that a target came with is hardly another than the row's: no target is of a far context.
    by_target = {tuple(value.tolist()): place for place, value in enumerate(pairs.chosen)}
    own = context[[by_target[tuple(value.tolist())] for value in rows.target]]
    row_context = rows.row_context()
    assert row_context is not None
    assert float((own - row_context).square().sum(1).mean().sqrt()) < 0.1


def test_groups_and_loose_pairs():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 40, 3, generator=generator)
    group = torch.arange(40) // 10
    rows = all_rows(make_coupling(EncodedPairs(chosen, rejected, group=group), source="rejected", coupling="ot"))
    place = {tuple(value.tolist()): number for number, value in enumerate(chosen)}
    origin = {tuple(value.tolist()): number for number, value in enumerate(rejected)}
    for source, target in zip(rows.source, rows.target, strict=True):
        assert place[tuple(target.tolist())] // 10 == origin[tuple(source.tolist())] // 10
    # Neither contexts nor groups: one law, one pool.
    assert int(EncodedPairs(chosen, rejected).pool.max()) == 0


@pytest.mark.parametrize("name", ["independent", "ot"])
def test_contexts_of_one_pair_each_are_refused_with_a_way_out(name: str):
    chosen, rejected, context = torch.randn(3, 10, 2)
    with pytest.raises(ValueError, match=r"each of these 10 pairs has its own.*coupling='paired', or 'c2ot'"):
        make_coupling(EncodedPairs(chosen, rejected, context), source="rejected", coupling=name)


def test_what_does_not_go_together_is_refused():
    chosen, rejected = torch.randn(2, 10, 2)
    pairs = EncodedPairs(chosen, rejected)
    with pytest.raises(ValueError, match="these pairs have none: use 'ot'"):
        make_coupling(pairs, source="rejected", coupling="c2ot")
    with pytest.raises(ValueError, match=r"coupling must be one of paired, independent, ot, c2ot.*: got 'ott'"):
        make_coupling(pairs, source="rejected", coupling="ott")
    with pytest.raises(ValueError, match="goes with source='reference' and coupling='paired'"):
        make_coupling(pairs, source="reference", coupling="ot", best_of=4)


@pytest.mark.parametrize(
    ("scores", "best_of", "shares"),
    [
        ([0.0, 1.0, 1.0], 3, [0, 1 / 2, 1 / 2]),
        ([1.0, 1.0, 1.0, 1.0], 3, [1 / 4] * 4),
        ([1.0, 0.0, 2.0, 1.0], 3, [1 / 8, 0, 3 / 4, 1 / 8]),
        ([0.0, 1.0, 2.0, 3.0], 3, [0, 0, 1 / 4, 3 / 4]),
    ],
)
def test_of_equal_candidates_each_is_as_likely_to_be_the_best(scores, best_of, shares):
    count = len(scores)
    other = [5.0, 6.0, 7.0, 8.0]  # another prompt's candidates, none equal
    pairs = EncodedPairs.from_table(
        torch.arange(count + 4)[:, None].float(), torch.tensor([0, count]), torch.tensor([1, count + 1]),
        contexts=torch.zeros(2, 1), context_index=torch.tensor([0, 1]),
        candidates=[
            (0, torch.arange(count), torch.tensor(scores)),
            (1, torch.arange(count, count + 4), torch.tensor(other)),
        ],
    )  # fmt: skip
    coupling = make_coupling(pairs, source="reference", coupling="paired", best_of=best_of)
    draws = 20_000
    rows = coupling.draw(torch.arange(len(coupling)).repeat(draws), torch.Generator().manual_seed(0))
    target = rows.target.view(draws, -1).long()
    found = torch.bincount(target[:, :count].flatten(), minlength=count + 4) / target[:, :count].numel()
    assert found.tolist() == pytest.approx([*shares, 0, 0, 0, 0], abs=0.006)
    assert int(target[:, count:].min()) >= count


def test_candidate_sets_count_with_the_weights_of_their_pairs():
    table = torch.arange(12.0)[:, None]
    first, second = torch.tensor([2, 5, 11, 10]), torch.tensor([0, 3, 6, 7])
    sets = [(0, torch.arange(3), torch.arange(3.0)), (1, torch.arange(3, 6), torch.arange(3.0)),
            (2, torch.arange(6, 12), torch.arange(6.0))]  # fmt: skip
    contexts, place = torch.eye(3), torch.tensor([0, 1, 2, 2])
    weight = torch.tensor([0.0, 2.0, 3.0, 1.0])
    pairs = EncodedPairs.from_table(
        table, first, second, contexts=contexts, context_index=place, weight=weight, candidates=sets
    )
    assert pairs.candidate_weights is not None
    assert pairs.candidate_weights.tolist() == [0.0, 2.0, 2.0]
    joined = BestOf(pairs, 3).draw(torch.arange(12), torch.Generator().manual_seed(0))
    assert joined.weight[:3].eq(0).all()
    assert joined.weight[3:].eq(joined.weight[3]).all()
    assert float(joined.weight.mean()) == pytest.approx(1.0)
    plain = EncodedPairs.from_table(table, first, second, contexts=contexts, context_index=place, candidates=sets)
    assert plain.candidate_weights is None


@pytest.mark.parametrize("source", ["reference", "rejected"])
@pytest.mark.parametrize("name", ["paired", "independent"])
def test_a_pairs_weight_is_its_rows_weight_with_mean_one(name: str, source: str):
    chosen, rejected = torch.tensor([[1.0], [2.0], [3.0]]), -torch.tensor([[1.0], [2.0], [3.0]])
    pairs = EncodedPairs(chosen, rejected, weight=[1.0, 3.0, 8.0])
    rows = all_rows(make_coupling(pairs, source=source, coupling=name))
    expected = {1.0: 0.25, 2.0: 0.75, 3.0: 2.0}
    assert rows.weight.tolist() == pytest.approx([expected[abs(value)] for value in rows.source.flatten().tolist()])
    assert float(rows.weight.mean()) == pytest.approx(1.0)


@pytest.mark.parametrize("source", ["reference", "rejected"])
@pytest.mark.parametrize("name", ["paired", "independent"])
def test_soft_labels_keep_the_mean_weight_at_one(name: str, source: str):
    pairs = EncodedPairs(torch.ones(3, 1), torch.zeros(3, 1), weight=[1.0, 3.0, 8.0], probability=[0.9, 0.5, 0.6])
    rows = all_rows(make_coupling(pairs, source=source, coupling=name))
    assert float(rows.weight.mean()) == pytest.approx(1.0)
    ones = float((rows.source.flatten() * rows.weight).sum() / rows.weight.sum())
    assert ones == pytest.approx(0.5 if source == "reference" else (0.1 + 1.5 + 3.2) / 12)


@pytest.mark.parametrize("source", ["reference", "rejected"])
@pytest.mark.parametrize("name", COUPLINGS)
def test_items_are_of_the_prompt_that_their_source_is_of(name: str, source: str):
    """The second coordinate of every output is its context's number, which is the prompt's."""
    pairs = contextual(40, contexts=4)
    coupling = make_coupling(pairs, source=source, coupling=name)
    index = torch.arange(len(coupling)).flip(0)[::3]
    numbers = {int(group): float(number) for group, number in zip(pairs.group, pairs.chosen[:, 1], strict=True)}
    group = coupling.group_of(index)
    rows = coupling.draw(index, torch.Generator().manual_seed(0))
    assert [numbers[int(each)] for each in group.repeat(rows.repeats)] == rows.source[:, 1].tolist()
    assert rows.source.shape == (len(index) * coupling.rows_per_item, 2)
    hidden = WithoutContext(coupling)
    again = hidden.draw(index, torch.Generator().manual_seed(0))
    assert again.context is None
    assert torch.equal(again.source, rows.source)
    assert torch.equal(again.target, rows.target)
    assert (len(hidden), hidden.rows_per_item) == (len(coupling), coupling.rows_per_item)
    assert torch.equal(hidden.group_of(index), group)


def test_candidates_are_of_their_sets():
    table = torch.arange(7.0)[:, None]
    sets = [(0, torch.tensor([0, 1, 2]), torch.tensor([3.0, 1.0, 2.0])), (1, torch.arange(3, 7), torch.arange(4.0))]
    pairs = EncodedPairs.from_table(
        table, [0, 6], [1, 3], contexts=torch.eye(2), context_index=[0, 1], candidates=sets, weight=[1.0, 4.0]
    )
    coupling = BestOf(pairs, 3)
    rows = coupling.draw(torch.arange(7), torch.Generator().manual_seed(0))
    assert len(coupling) == 7
    assert coupling.group_of(torch.arange(7)).tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert rows.source.flatten().sort().values.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert rows.target[:3].flatten().tolist() == [0.0] * 3  # of three of three the best is the best of all
    assert set(rows.target[3:].flatten().tolist()) <= {5.0, 6.0}
    assert rows.context is not None
    assert torch.equal(rows.context, torch.eye(2)[[0, 0, 0, 1, 1, 1, 1]])
    assert rows.weight.tolist() == pytest.approx([7 / 19] * 3 + [28 / 19] * 4)
    several = torch.zeros(4000, dtype=torch.long) + 3
    best = coupling.draw(several, torch.Generator().manual_seed(1)).target.flatten()
    assert float((best == 6).float().mean()) == pytest.approx(0.75, abs=0.03)  # 3 of the 4 sets of three hold it


def test_samples_that_are_joined_already_are_gathered_as_they_are():
    source, target = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    context = torch.arange(6.0)[:, None]
    rows = Joined(source, target, context).draw(torch.tensor([4, 1]))
    assert torch.equal(rows.source, source[[4, 1]])
    assert torch.equal(rows.target, target[[4, 1]])
    assert rows.context is not None
    assert rows.context.flatten().tolist() == [4.0, 1.0]
    assert rows.weight.tolist() == [1.0, 1.0]
    assert Joined(source, target, None).draw(torch.tensor([0])).context is None
    assert Joined(source, target, None).group_of(torch.tensor([4, 1])).tolist() == [4, 1]


@pytest.mark.parametrize("name", ["independent", "best of"])
def test_what_is_drawn_depends_on_the_generator_alone(name: str):
    pairs = contextual(60, contexts=2)
    if name == "best of":
        sets = [(0, torch.arange(60), torch.arange(60.0))]
        pairs = EncodedPairs.from_table(torch.arange(60.0)[:, None], [59], [0], candidates=sets)
    coupling = BestOf(pairs, 3) if name == "best of" else make_coupling(pairs, source="rejected", coupling=name)
    drawn = [coupling.draw(torch.arange(60), torch.Generator().manual_seed(seed)).target for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_ot_in_blocks_depends_on_its_seed_alone():
    pairs = EncodedPairs(torch.arange(2500.0)[:, None] + 1, torch.arange(2500.0)[:, None])
    targets = [all_rows(make_coupling(pairs, source="rejected", coupling="ot", seed=seed)).target for seed in (0, 0, 1)]
    assert torch.equal(targets[0], targets[1])
    assert not torch.equal(targets[0], targets[2])


def test_equal_candidates_are_equally_often_the_best_of_their_own_set():
    table = torch.arange(9.0)[:, None]
    sets = [(0, torch.arange(first, first + 3), torch.tensor([0.0, 1.0, 1.0])) for first in (0, 3, 6)]
    pairs = EncodedPairs.from_table(table, [1, 4, 7], [0, 3, 6], group=torch.arange(3), candidates=sets)
    coupling = BestOf(pairs, 2)
    assert (coupling.best_of, len(coupling)) == (2, 9)
    index = torch.arange(9).repeat(2000)
    drawn = [coupling.draw(index, torch.Generator().manual_seed(seed)).target.flatten() for seed in (0, 0)]
    assert torch.equal(*drawn)
    for first in (0, 3, 6):
        shares = torch.bincount(drawn[0][index // 3 == first // 3].long(), minlength=9).float() / 6000
        assert shares[first + 1 : first + 3].tolist() == pytest.approx([0.5, 0.5], abs=0.03)


def test_a_prompt_of_one_pair_keeps_its_own_target():
    chosen, rejected = torch.arange(5.0)[:, None] + 10, torch.arange(5.0)[:, None]
    for group, alone in (([0, 1, 1, 2, 2], 0), ([0, 0, 1, 1, 2], 4)):
        pairs = EncodedPairs(chosen, rejected, group=torch.tensor(group))
        coupling = make_coupling(pairs, source="rejected", coupling="independent")
        rows = coupling.draw(torch.arange(5).repeat(400), torch.Generator().manual_seed(0))
        targets = [set(rows.target.flatten()[number::5].tolist()) for number in range(5)]
        for number, own in enumerate(targets):
            assert own == {10.0 + other for other in range(5) if group[other] == group[number]}
        assert len(targets[alone]) == 1
