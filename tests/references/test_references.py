"""Pools of references: shares against closed forms, tagged flows against exact draws, and what is refused."""

import math

import pytest
import torch
from support.rounding import assert_same
from support.spelled import Spelled

from pfm import EncodedPairs, FlowConfig, wrap
from pfm.generators import GeneratorPool
from pfm.references import PooledFlow, TaggedEnds, TaggedPairs, learned_shares, maximin_shares, winners_shares

MEANS = torch.tensor([[-1.0, 0.0], [1.0, 0.5]])
WANTS = torch.tensor([1.0, 1.0])
RATES = torch.tensor([[0.5, 0.2, 0.6], [0.8, 0.5, 0.7], [0.4, 0.3, 0.5]])
FAST = FlowConfig(hidden=64, layers=2, epochs=25)


def drawn(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    tag = torch.randint(2, (count,), generator=generator)
    return MEANS[tag] + 0.5 * torch.randn(count, 2, generator=generator), tag


def preferred(y: torch.Tensor, other: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(len(y), generator=generator) < torch.sigmoid((y - other) @ WANTS)


def tagged_pairs(count: int, seed: int = 0) -> TaggedPairs:
    generator = torch.Generator().manual_seed(seed)
    (one, tag), (other, tag_of_other) = (drawn(count, generator) for _ in range(2))
    first = preferred(one, other, generator)
    pairs = EncodedPairs(torch.where(first[:, None], one, other), torch.where(first[:, None], other, one))
    return TaggedPairs.of(pairs, torch.where(first, tag, tag_of_other), torch.where(first, tag_of_other, tag))


@pytest.fixture(scope="module")
def flow() -> PooledFlow:
    return PooledFlow.fit(tagged_pairs(4000), FAST, progress=False)


# -- shares ----------------------------------------------------------------------------------------------------------


def test_win_rates_are_counted_with_a_prior_and_shares_of_winners_are_those_of_the_votes():
    tagged = tagged_pairs(20_000)
    found = tagged.win_rates()
    one = MEANS + 0.5 * torch.randn(40_000, 1, 2, generator=torch.Generator().manual_seed(1))
    other = MEANS + 0.5 * torch.randn(40_000, 1, 2, generator=torch.Generator().manual_seed(2))
    exact = torch.sigmoid((one[:, :, None] - other[:, None, :]) @ WANTS).mean(0)
    torch.testing.assert_close(found.rates, exact, atol=0.015, rtol=0)
    torch.testing.assert_close(found.rates + found.rates.T, torch.ones(2, 2))
    assert float(found.votes.triu().sum()) == pytest.approx(20_000 + float(found.votes.diagonal().sum()) / 2, rel=0.02)
    # p1 = 2 pi_ref b: the tags of the winners are what the rates make of the shares.
    winners = torch.bincount(tagged.chosen_tag).float() / len(tagged)
    torch.testing.assert_close(winners_shares(found, tagged.shares), winners, atol=0.01, rtol=0)
    few = TaggedPairs.of(EncodedPairs([[1.0]], [[0.0]]), ["a"], ["b"]).win_rates(prior=2)
    assert few.rates.tolist() == [[0.5, pytest.approx(0.6)], [pytest.approx(0.4), 0.5]]


def test_soft_labels_and_weights_count_in_the_rates():
    pairs = EncodedPairs([[1.0], [1.0]], [[0.0], [0.0]], weight=[3.0, 1.0], probability=[0.5, 1.0])
    found = TaggedPairs.of(pairs, ["a", "a"], ["b", "b"]).win_rates(prior=1e-9)
    assert float(found.rates[0, 1]) == pytest.approx(2.5 / 4)
    assert found.votes.tolist() == [[0, 4], [4, 0]]


def test_learned_shares_maximise_the_chance_less_the_divergence():
    base = torch.tensor([0.5, 0.2, 0.3])
    found = learned_shares(RATES, base, temperature=0.1)

    def value(shares: torch.Tensor) -> float:
        return float(shares @ RATES @ base - 0.1 * (shares * (shares / base).log()).sum())

    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        other = torch.softmax(found.log() + 0.3 * torch.randn(3, generator=generator), 0)
        assert value(found) >= value(other) - 1e-7
    assert learned_shares(RATES, base, temperature=1e-4).tolist() == pytest.approx([0, 1, 0], abs=1e-6)
    torch.testing.assert_close(learned_shares(RATES, base, temperature=1e6), base, atol=1e-5, rtol=0)
    assert learned_shares(torch.full((3, 3), 0.5)).tolist() == pytest.approx([1 / 3] * 3)


def test_maximin_shares_are_the_winner_where_there_is_one_and_even_on_a_cycle():
    assert maximin_shares(RATES).tolist() == pytest.approx([0, 1, 0], abs=1e-6)
    cycle = torch.tensor([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]])
    assert maximin_shares(cycle).tolist() == pytest.approx([1 / 3] * 3, abs=1e-6)
    uneven = torch.tensor([[0.5, 0.9, 0.4], [0.1, 0.5, 0.8], [0.6, 0.2, 0.5]])
    shares = maximin_shares(uneven)
    assert float((shares @ uneven).min()) == pytest.approx(0.5, abs=1e-5)


def test_bad_rates_shares_and_tags_are_refused_by_name():
    with pytest.raises(ValueError, match=r"rates\[i, j\] \+ rates\[j, i\] = 1"):
        maximin_shares([[0.5, 0.9], [0.9, 0.5]])
    with pytest.raises(ValueError, match=r"\[0, 1\] and be finite"):
        learned_shares([[0.5, math.nan], [0.5, 0.5]])
    with pytest.raises(ValueError, match="shares must sum to 1"):
        learned_shares(RATES, [0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="shares must be at least 0"):
        winners_shares(RATES, [1.5, -0.5, 0.0])
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        learned_shares(RATES, temperature=0.0)
    pairs = EncodedPairs([[1.0], [1.0]], [[0.0], [0.0]])
    with pytest.raises(ValueError, match="chosen_tags must have one entry a pair: got 1 for 2 pairs"):
        TaggedPairs.of(pairs, ["a"], ["b", "b"])
    with pytest.raises(ValueError, match="rejected_tags must name every pair's: number 1 is None"):
        TaggedPairs.of(pairs, ["a", "a"], ["b", None])
    with pytest.raises(ValueError, match="source 'c' made none of the outputs"):
        TaggedPairs.of(pairs, ["a", "a"], ["b", "b"], names=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"tags must be among \['a'\]"):
        TaggedPairs.of(pairs, ["a", "a"], ["b", "b"], names=["a"])
    with pytest.raises(ValueError, match="source 'b' has no pairs of two outputs of its own"):
        TaggedPairs.of(pairs, ["a", "a"], ["a", "b"]).within("b")
    with pytest.raises(ValueError, match="prior must be a positive number"):
        TaggedPairs.of(pairs, ["a", "a"], ["a", "b"]).win_rates(0)


def test_tags_of_a_pool_of_generators_are_tags_of_pairs():
    pool = GeneratorPool({"short": lambda prompt: "no", "long": lambda prompt: "yes, of course"}, seed=1)
    draw = next(iter(pool.draws(["really?"], 4)))
    texts, tags = draw.texts, draw.tags
    chosen, rejected = texts.index("yes, of course"), texts.index("no")
    pairs = EncodedPairs([[14.0]], [[2.0]])
    tagged = TaggedPairs.of(pairs, [tags[chosen]], [tags[rejected]], names=list(pool.generators))
    assert tagged.names == ("short", "long")
    assert (tagged.chosen_tag.tolist(), tagged.rejected_tag.tolist()) == ([1], [0])


# -- flows -----------------------------------------------------------------------------------------------------------


def test_each_source_is_carried_to_the_winner_of_itself_against_the_pool(flow):
    generator = torch.Generator().manual_seed(5)
    y, tag = drawn(8000, generator)
    opponent, _ = drawn(8000, generator)
    winners = torch.where(preferred(y, opponent, generator)[:, None], y, opponent)
    moved = flow.transport(y, tag=tag)
    for number in range(2):
        ours, exact = moved[tag == number], winners[tag == number]
        torch.testing.assert_close(ours.mean(0), exact.mean(0), atol=0.1, rtol=0)
        torch.testing.assert_close(ours.std(0), exact.std(0), atol=0.12, rtol=0)
    # A draw of the weaker source is moved further, and with the wrong tag it would be left where it is.
    apart = (moved - y).norm(dim=1)
    assert float(apart[tag == 0].mean()) > 2 * float(apart[tag == 1].mean())
    mistaken = flow.transport(y[tag == 0], tag="1")
    assert float(mistaken[:, 0].mean()) < float(moved[tag == 0][:, 0].mean()) - 0.3


def test_b_is_the_chance_against_the_pool(flow):
    generator = torch.Generator().manual_seed(6)
    y, tag = drawn(1000, generator)
    pool, _ = drawn(1000, generator)
    exact = torch.sigmoid((y[:, None] - pool) @ WANTS).mean(1)
    assert float((flow.win_probability(y, tag=tag) - exact).abs().mean()) < 0.03


def test_shuffled_labels_move_nobody_and_name_no_source(flow):
    control = PooledFlow.fit(tagged_pairs(4000).shuffle_labels(), FlowConfig(residual=False), progress=False)
    y, tag = drawn(4000, torch.Generator().manual_seed(7))
    gain, nothing = (float(((f.transport(y, tag=tag) - y) @ WANTS).mean()) for f in (flow, control))
    assert gain > 0.5
    assert abs(nothing) < 0.08
    assert float((control.rates - 0.5).abs().max()) < 0.03
    assert learned_shares(flow.rates)[1] > 0.9


def test_a_pooled_flow_is_read_as_it_was_written_and_rows_are_independent(flow, tmp_path):
    y, tag = drawn(50, torch.Generator().manual_seed(8))
    read = PooledFlow.load(flow.save(tmp_path / "pool"))
    assert_same(read.transport(y, tag=tag), flow.transport(y, tag=tag))
    assert_same(read.win_probability(y, tag=tag), flow.win_probability(y, tag=tag))
    assert (read.names, read.shares.tolist()) == (flow.names, flow.shares.tolist())
    names = [flow.names[number] for number in tag.tolist()]
    torch.testing.assert_close(flow.transport(y[:7], tag=names[:7]), flow.transport(y, tag=tag)[:7])
    torch.testing.assert_close(flow.trajectory(y, tag=tag, times=[1.0])[0], flow.transport(y, tag=tag))
    (tmp_path / "pool" / "pool.json").write_text("{")
    with pytest.raises(ValueError, match="damaged pooled flow"):
        PooledFlow.load(tmp_path / "pool")
    with pytest.raises(FileNotFoundError, match=r"pool\.json"):
        PooledFlow.load(tmp_path)


def test_what_a_pooled_flow_cannot_do_is_said(flow):
    y, _ = drawn(5, torch.Generator().manual_seed(9))
    with pytest.raises(ValueError, match="tag must be one of 0, 1: got 'third'"):
        flow.transport(y, tag="third")
    with pytest.raises(ValueError, match="tag must be one for all rows, or 5: got 2"):
        flow.transport(y, tag=[0, 1])
    with pytest.raises(TypeError, match="options must be strength, steps or on_failure: got mode"):
        flow.transport(y, tag=0, mode="gated")
    with pytest.raises(ValueError, match="must be finite"):
        flow.transport(y * math.nan, tag=0)
    with pytest.raises(TypeError, match="TaggedPairs"):
        PooledFlow.fit(tagged_pairs(10).pairs)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="coupling='paired'"):
        PooledFlow.fit(tagged_pairs(10), {"coupling": "ot"})


def test_a_wrapped_pool_tells_its_flow_who_made_each_candidate(flow):
    texts = {"0": "-1 0", "1": "1 0.5"}
    pool = GeneratorPool({name: lambda prompt, text=text: text for name, text in texts.items()})
    refined = wrap(pool, flow, encoder=Spelled(2), n=4)("any prompt")
    assert refined.generator == "1"
    assert refined.text == texts["1"]
    y = Spelled(2).encode(refined.candidates)
    expected = flow.win_probability(y, tag=refined.generators)
    torch.testing.assert_close(torch.tensor(refined.probabilities), expected)
    # The same output counts as it does for its maker, and what is no text takes no tag with it.
    refiner = wrap(None, flow, encoder=Spelled(2))
    one, other = refiner.refine([["0 0.2"], ["", "0 0.2"]], ["a", "b"], generators=["0", ["0", "1"]])
    apart = flow.win_probability(torch.tensor([[0.0, 0.2]] * 2), tag=["0", "1"]).tolist()
    assert [one.win_probability, other.win_probability] == pytest.approx(apart)


def test_what_a_pooled_flow_needs_to_be_wrapped_is_said(flow):
    with pytest.raises(ValueError, match="fitted on outputs of 0, 1: the pool has third too"):
        wrap(GeneratorPool({"0": lambda prompt: prompt, "third": lambda prompt: prompt}), flow, encoder=Spelled(2))
    with pytest.raises(ValueError, match="decoder='select' by 'win_probability' or 'sample'"):
        wrap(None, flow, encoder=Spelled(2), by="alignment")
    refiner = wrap(None, flow, encoder=Spelled(2))
    with pytest.raises(ValueError, match="which of 0, 1 made each candidate"):
        refiner.refine(["0 0"], ["a"])
    with pytest.raises(ValueError, match="got 1 rows for 1 prompts, and they differ at row 0"):
        refiner.refine([["0 0", "1 1"]], ["a"], generators=["0"])
    with pytest.raises(ValueError, match="tag must be one of 0, 1: got 'third'"):
        refiner.refine(["0 0"], ["a"], generators=["third"])


def test_contexts_and_soft_labels_go_with_tags():
    generator = torch.Generator().manual_seed(10)
    (one, tag), (other, tag_of_other) = (drawn(600, generator) for _ in range(2))
    context = torch.randint(3, (600, 1), generator=generator).float()
    pairs = EncodedPairs(one, other, context, probability=torch.sigmoid((one - other) @ WANTS), group=torch.arange(600))
    tagged = TaggedPairs.of(pairs, tag, tag_of_other)
    flow = PooledFlow.fit(tagged, FlowConfig(residual=False), progress=False)
    y, tags = drawn(200, generator)
    moved = flow.transport(y, torch.zeros(1), tag=tags)
    assert float(((moved - y) @ WANTS).mean()) > 0.3
    assert flow.win_probability(y, torch.zeros(200, 1), tag=tags).shape == (200,)


def test_tagged_ends_start_from_all_members_or_from_the_losers():
    chosen, rejected = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[-1.0], [-2.0], [-3.0]])
    pairs = EncodedPairs(chosen, rejected, weight=[1.0, 2.0, 3.0], group=torch.tensor([7, 8, 9]))
    tagged = TaggedPairs.of(pairs, torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1]))
    losers = TaggedEnds(tagged, "rejected")
    rows = losers.draw(torch.arange(len(losers)))
    assert rows.source.flatten().tolist() == [-1.0, -2.0, -3.0]
    assert rows.target.flatten().tolist() == [1.0, 2.0, 3.0]
    assert rows.weight.tolist() == [0.5, 1.0, 1.5]
    assert rows.context is not None
    assert rows.context.argmax(1).tolist() == [1, 0, 1]
    assert losers.group_of(torch.tensor([2, 0])).tolist() == tagged.pairs.group[[2, 0]].tolist()
    both = TaggedEnds(tagged, "reference")
    rows = both.draw(torch.arange(len(both)))
    assert rows.source.flatten().tolist() == [1.0, -1.0, 2.0, -2.0, 3.0, -3.0]
    assert rows.target.flatten().tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    assert rows.context is not None
    assert rows.context.argmax(1).tolist() == [0, 1, 1, 0, 1, 1]
    assert both.group_of(torch.tensor([5, 0])).tolist() == tagged.pairs.group[[2, 0]].tolist()
