"""b, gate, guard, selection, targets and rounds of labels by a preference model, cyclic ones too."""

import json
import math
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.rounding import assert_same

import pfm
from pfm import EncodedPairs, FlowConfig, PreferenceFlow
from pfm.decoders import Select
from pfm.flow.preference_win import candidate_wins, rescored
from pfm.flow.rounds import CyclingWarning, as_labeller, labelled
from pfm.preferences import BradleyTerry, Embedded, GeneralPreference, MeanShift, PreferenceModel
from pfm.preferences.context_mean import ContextMean

BEATS = torch.tensor([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]])  # 0 beats 1 beats 2 beats 0
SHARES = torch.tensor([0.5, 0.2, 0.3])
CHANCE = BEATS @ SHARES  # b of each kind: .45, .40, .65
CENTRES = 3 * torch.tensor([[0.0, 1.0], [-0.866, -0.5], [0.866, -0.5]])
CLOSED = FlowConfig(residual=False, validation_share=0.2)


def draws(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw outputs of three kinds, and the kinds."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.multinomial(SHARES, count, replacement=True, generator=generator)
    return CENTRES[kind] + 0.3 * torch.randn(count, 2, generator=generator), kind


def cyclic_pairs(count: int = 2000, seed: int = 0, contexts: bool = False) -> EncodedPairs:
    one, kind = draws(count, seed)
    other, other_kind = draws(count, seed + 1000)
    coin = torch.rand(count, generator=torch.Generator().manual_seed(seed + 2000))
    first = (coin < BEATS[kind, other_kind])[:, None]
    context = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed + 3000)) if contexts else None
    return EncodedPairs(torch.where(first, one, other), torch.where(first, other, one), context)


@pytest.fixture(scope="module")
def model() -> GeneralPreference:
    return GeneralPreference(blocks=2, hidden=32).fit(cyclic_pairs())


@pytest.fixture(scope="module")
def flow(model) -> PreferenceFlow:
    config = CLOSED.replace(source="rejected")
    return PreferenceFlow.fit(cyclic_pairs(seed=1), config, preference=model, progress=False)


# -- b ------------------------------------------------------------------------------------------------------------


def test_b_is_the_mean_chance_against_the_reference(flow):
    y, kind = draws(1500, 7)
    b = flow.win_probability(y)
    for number in range(3):
        assert float(b[kind == number].mean()) == pytest.approx(float(CHANCE[number]), abs=0.06)
    slope = flow.win_gradient(y[:4])
    ahead, behind = (flow.win_probability(y[:4] + step * torch.tensor([[1e-2, 0]])).log() for step in (1, -1))
    torch.testing.assert_close(slope[:, 0], (ahead - behind) / 2e-2, atol=0.05, rtol=0.1)


def test_the_gate_keeps_each_kind_as_often_as_it_wins(flow):
    y, kind = draws(3000, 8)
    kept = (flow.transport(y, mode="gated") == y).all(1)
    for number in range(3):
        assert float(kept[kind == number].float().mean()) == pytest.approx(float(CHANCE[number]), abs=0.08)


def test_candidates_are_each_others_opponents(flow, model):
    y = torch.cat([CENTRES[[0, 1]], CENTRES[[0, 1, 2]], CENTRES[[2]]])
    prompt = torch.tensor([0, 0, 1, 1, 1, 2])
    b = flow.candidate_probabilities(y, None, prompt)
    assert b[:2].tolist() == pytest.approx([1, 0], abs=0.05)  # against kind 1 alone kind 0 is sure to win
    assert b[2:5].tolist() == pytest.approx([0.5] * 3, abs=0.05)
    assert float(b[5]) == pytest.approx(float(flow.win_probability(CENTRES[[2]])))  # alone: against the reference
    torch.testing.assert_close(b[2:5], candidate_wins(model, CENTRES))


def test_contexts_choose_the_opponents():
    """Where contexts shift all outputs alike, b compares an output with draws of contexts like its own."""
    generator = torch.Generator().manual_seed(0)
    context = 4 * torch.randn(3000, 1, generator=generator)
    one, other = context + torch.randn(2, 3000, 1, generator=generator)
    pairs = EncodedPairs(torch.maximum(one, other), torch.minimum(one, other), context)
    flow = PreferenceFlow.fit(pairs, CLOSED, preference=BradleyTerry(1e-3), progress=False)
    at = torch.tensor([[-3.0], [0.0], [3.0]])
    assert flow.win_probability(at, at).tolist() == pytest.approx([0.5] * 3, abs=0.12)
    assert float(flow.win_probability(at[:1] + 2, at[0])) > 0.8
    assert float(flow.win_probability(at[:1] - 2, at[0])) < 0.2


def test_context_means_shrink_to_the_line_and_rows_of_weight_zero_do_not_count():
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(50, 2, generator=generator).repeat(6, 1)
    value = context @ torch.tensor([2.0, -1.0]) + 1
    weight, group = torch.ones(300), torch.arange(300) % 50
    mean = ContextMean(2)
    torch.testing.assert_close(mean.fit(context, value, weight, group, generator), value, atol=0.02, rtol=0)
    elsewhere = torch.tensor([[3.0, 3.0]])
    assert float(mean(elsewhere)) == pytest.approx(4, abs=0.05)
    weight[::2], spoilt = 0, value.clone()
    spoilt[::2] += 100
    mean.fit(context, spoilt, weight, group, generator)
    assert float(mean(elsewhere)) == pytest.approx(4, abs=0.1)
    noise = torch.randn(300, generator=generator)
    assert float(mean.fit(context, noise, torch.ones(300), group, generator).abs().mean()) < 0.25


def test_a_flow_saved_before_contexts_had_levels_still_loads(tmp_path):
    context = torch.randn(60, 1)
    pairs = EncodedPairs(context + torch.rand(60, 1), context - torch.rand(60, 1), context)
    flow = PreferenceFlow.fit(pairs, CLOSED, preference=BradleyTerry(1e-3), progress=False)
    flow.save_pretrained(tmp_path)
    again = PreferenceFlow.from_pretrained(tmp_path)
    torch.testing.assert_close(again.win_probability(context, context), flow.win_probability(context, context))
    described = json.loads((tmp_path / "config.json").read_text())
    del described["metadata"]["preference"]["anchors"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name: value for name, value in tensors.items() if "level" not in name}
    save_file(tensors | {"win.context_spread": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    old = PreferenceFlow.from_pretrained(tmp_path)
    assert bool(torch.isfinite(old.win_probability(context, context)).all())


def test_the_guard_is_set_by_pairs_and_shut_by_shuffled_ones(flow, model):
    assert flow.guard_margin < 0.5
    assert flow.metadata["win"]["accuracy"] > 0.75  # pairs of one kind are a coin: 0.81 at best
    assert flow.metadata["win"]["preference"] == "GeneralPreference"
    pairs = cyclic_pairs(800, seed=2)
    blind = GeneralPreference(hidden=0).fit(pairs.shuffle_labels())
    assert flow.with_preference(blind, cyclic_pairs(800, seed=3).shuffle_labels(1)).guard_margin == math.inf
    assert flow.with_preference(model, pairs.swap()).guard_margin == math.inf


def test_it_is_saved_and_loaded_with_the_flow(flow, tmp_path):
    flow.save_pretrained(tmp_path)
    again = PreferenceFlow.from_pretrained(tmp_path)
    y, _ = draws(40, 9)
    assert isinstance(again.preference, GeneralPreference)
    torch.testing.assert_close(again.win_probability(y), flow.win_probability(y))
    assert_same(again.transport(y, mode="gated"), flow.transport(y, mode="gated"))
    assert again.guard_margin == flow.guard_margin
    assert again.metadata["win"] == flow.metadata["win"]
    assert "b      orders" in again.summary()


def test_a_flow_takes_another_preference_and_stays_as_it_is(flow):
    plain = PreferenceFlow.fit(cyclic_pairs(600, seed=4), CLOSED, progress=False)
    assert plain.preference is None
    taken = plain.with_preference(BradleyTerry().fit(cyclic_pairs(600, seed=4)), cyclic_pairs(600, seed=5))
    y, _ = draws(20, 9)
    assert plain.preference is None
    assert isinstance(taken.preference, BradleyTerry)
    assert_same(taken.transport(y), plain.transport(y))
    student = taken.distill(draws(200, 1)[0], progress=False)
    torch.testing.assert_close(student.win_probability(y), taken.win_probability(y))


# -- selection ----------------------------------------------------------------------------------------------------


class Kinds:
    """Encodes the text "kind 2" at the centre of kind 2."""

    dimension = 2

    def encode(self, texts, *, progress=False):
        return CENTRES[[int(text[-1]) for text in texts]]

    def describe(self):
        return {"name": "kinds"}


def test_selection_judges_candidates_by_each_other(flow):
    refiner = pfm.wrap(None, flow=flow, encoder=Kinds())
    for original, other, wanted in ((0, 1, 0), (1, 0, 0), (0, 2, 2), (1, 2, 1)):
        result = refiner.refine([[f"kind {original}", f"kind {other}"]], ["?"])[0]
        assert result.text == f"kind {wanted}"
        assert sum(result.probabilities) == pytest.approx(1, abs=1e-5)


def test_the_guard_judges_one_pair_alike_among_few_candidates_and_many(flow, model):
    y = torch.cat([CENTRES[[0]], CENTRES[[2]], draws(62, 3)[0]])
    odds = float(model.score(y[[1]], y[[0]]))
    assert odds > 0  # kind 2 beats kind 0
    for count in (2, 3, 64):
        b = flow.candidate_probabilities(y[:count], None, torch.zeros(count, dtype=torch.long)).double().numpy()
        b[1] = 1.0  # whatever the others do, the second is chosen
        texts = [f"text {n}" for n in range(count)]
        for margin, changed in ((math.tanh(odds / 2) - 1e-4, True), (math.tanh(odds / 2) + 1e-4, False)):
            chosen = Select("win_probability", margin).decode(flow, texts, y[:count], None, b, "key")
            assert (chosen.index, chosen.changed) == (int(changed), changed)


class Following(PreferenceModel):
    """Prefers, under a positive context number, the larger first coordinate, and under a negative one the smaller."""

    def _build(self, dimension: int, contexts: int) -> None:
        self.dimension, self.context_dimension = dimension, contexts
        self.register_buffer("slope", torch.ones(()))

    def settings(self):
        return {}

    def fit(self, pairs, validation=None, *, progress=False):
        self._ready(dimension=pairs.dimension, contexts=pairs.context_dimension)
        return self

    def embed(self, y, context):
        assert context is not None
        return Embedded(y[:, 0] * context[:, 0] * self.slope, torch.zeros(len(y), 0, device=y.device))

    def _rescale(self, slope: float) -> None:
        self.slope *= slope


def test_candidates_are_judged_under_their_own_prompts_context():
    y = torch.tensor([[0.0], [1.0], [2.0], [0.0], [1.0], [5.0]])
    context = torch.tensor([[1.0], [1.0], [1.0], [-2.0], [-2.0], [1.0]])
    pairs = EncodedPairs(y[:5] + 1, y[:5], context[:5])
    flow = PreferenceFlow.fit(pairs, CLOSED, preference=Following().fit(pairs), progress=False)
    b = flow.candidate_probabilities(y, context, torch.tensor([0, 0, 0, 1, 1, 2]))
    one, two = (float(torch.sigmoid(torch.tensor(odds))) for odds in (1.0, 2.0))
    assert b[:3].tolist() == pytest.approx([1 - (one + two) / 2, 0.5, (one + two) / 2])
    assert b[3:5].tolist() == pytest.approx([two, 1 - two])
    assert float(b[5]) == pytest.approx(float(flow.win_probability(y[5:], context[5])))


def test_the_guard_is_judged_on_the_validation_pairs():
    one, other = torch.randn(2, 60, 2, generator=torch.Generator().manual_seed(0))
    first = (one[:, :1] > other[:, :1]).expand(60, 2)
    pairs = EncodedPairs(torch.where(first, one, other), torch.where(first, other, one), group=torch.arange(60))
    train, held = pairs.select(torch.arange(40)), pairs.select(torch.arange(40, 60))
    model = BradleyTerry(0.1).fit(train)
    flows = [
        PreferenceFlow.fit(train, CLOSED, validation=judging, preference=model, progress=False)
        for judging in (held, held.swap())
    ]
    assert flows[0].guard_margin < 0.5
    assert flows[0].metadata["win"]["accuracy"] > 0.8
    assert flows[1].guard_margin == math.inf
    assert flows[1].metadata["win"]["accuracy"] < 0.2


# -- best of m ----------------------------------------------------------------------------------------------------


def test_best_of_many_follows_the_preference_and_not_the_scores():
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(1200, 1, generator=generator)
    groups = torch.arange(1200).view(200, 6)
    values = table[groups].squeeze(2)
    pairs = EncodedPairs.from_table(
        table, groups[range(200), values.argmax(1)], groups[range(200), values.argmin(1)], group=torch.arange(200),
        candidates=[(i, rows, -table[rows, 0]) for i, rows in enumerate(groups)],
    )  # fmt: skip
    model = BradleyTerry(1e-3).fit(pairs)
    judged = rescored(pairs, model)
    assert judged.candidates is not None
    assert all(torch.equal(c.scores.argsort(), table[c.rows, 0].argsort()) for c in judged.candidates)
    config = CLOSED.replace(best_of=3)
    moved = [
        float((PreferenceFlow.fit(pairs, config, preference=by, progress=False).transport(table) - table).mean())
        for by in (None, model)
    ]
    assert moved[0] < -0.15 < 0.15 < moved[1]


# -- rounds -------------------------------------------------------------------------------------------------------


class Turning(PreferenceModel):
    """Prefers what lies clockwise of the other: a preference that is nothing but a cycle."""

    def _build(self, dimension: int) -> None:
        self.dimension = dimension
        self.register_buffer("slope", torch.tensor(5.0))

    def fit(self, pairs, validation=None, *, progress=False):
        self._ready(dimension=pairs.dimension)
        return self

    def embed(self, y, context):
        return Embedded(torch.zeros(len(y)), y.flip(-1)).scaled(self.slope**2)

    def _rescale(self, slope: float) -> None:
        self.slope *= slope**0.5


class Upwards(Turning):
    """Prefers what lies higher: a reward."""

    def embed(self, y, context):
        return Embedded(y[:, 1] * self.slope, torch.zeros(len(y), 0))


def relabelled(kind: type[Turning], rounds: int) -> PreferenceFlow:
    generator = torch.Generator().manual_seed(0)

    def fresh() -> torch.Tensor:
        return torch.tensor([0.6, 0.0]) + torch.randn(1500, 2, generator=generator)

    one, other = fresh(), fresh()
    model = kind().fit(EncodedPairs(one, other))
    first = (torch.rand(1500, generator=generator) < torch.sigmoid(model.score(one, other)))[:, None]
    pairs = EncodedPairs(torch.where(first, one, other), torch.where(first, other, one))
    flow = PreferenceFlow.fit(pairs, CLOSED, preference=model, progress=False)
    for _ in range(rounds - 1):
        flow = flow.relabel(model, fresh(), fresh(), check=1500, progress=False)
    return flow


def test_relabel_warns_when_the_population_goes_round(tmp_path):
    with pytest.warns(CyclingWarning, match="the preferences are cyclic, and further rounds need not converge"):
        flow = relabelled(Turning, 6)
    found = flow.metadata["rounds"]
    assert [check["rounds"] for check in found] == [2, 3, 4, 5, 6]
    assert not found[0]["cycling"]
    assert found[-1]["cycling"]
    assert found[-1]["wins"][-1] > 0.5
    flow.save_pretrained(tmp_path)
    assert PreferenceFlow.from_pretrained(tmp_path).metadata["rounds"] == found


def test_relabel_is_silent_where_a_reward_is_behind_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error", CyclingWarning)
        flow = relabelled(Upwards, 6)
    assert all(check["wins"][-1] > 0.5 and not check["cycling"] for check in flow.metadata["rounds"])


def test_a_model_labels_a_round(flow, model):
    y, other = draws(400, 11)[0], draws(400, 12)[0]
    torch.testing.assert_close(labelled(as_labeller(model), y, other, None), torch.sigmoid(model.score(y, other)))
    further = flow.relabel(model, y, other, config=CLOSED, check=50, progress=False)
    assert further.rounds == 2
    assert isinstance(further.later[0].preference, GeneralPreference)
    assert further.metadata["rounds"][0]["pairs"] == 50
    assert "rounds" not in flow.relabel(model, y, other, config=CLOSED, check=0, progress=False).metadata


# -- bad input ----------------------------------------------------------------------------------------------------


def test_what_is_no_preference_of_these_outputs_is_refused(flow, model):
    pairs = cyclic_pairs(50)
    with pytest.raises(TypeError, match=r"preference must be a pfm\.preferences\.PreferenceModel: got list"):
        flow.with_preference([1.0], pairs)
    with pytest.raises(RuntimeError, match="MeanShift is not fitted"):
        flow.with_preference(MeanShift(), pairs)
    wide = EncodedPairs(*torch.randn(2, 50, 3))
    with pytest.raises(ValueError, match="must have been fitted on dimension 2: got 3"):
        flow.with_preference(BradleyTerry().fit(wide), pairs)
    with pytest.raises(ValueError, match="pairs must have the flow's event_shape"):
        flow.with_preference(model, wide)
    with pytest.raises(ValueError, match="check must be a whole number"):
        flow.relabel(model, torch.zeros(4, 2), torch.zeros(4, 2), check=-1)
    with pytest.raises(ValueError, match="at least two candidates"):
        candidate_wins(model, CENTRES[:1])


def test_few_contexts_with_many_pairs_are_pointed_out(caplog):
    """Holding out whole classes drops all that is special to a class; pairs of their own groups keep it."""
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 1200, 1, generator=generator)
    context = torch.eye(4)[torch.arange(1200) % 4]
    sign = (context @ torch.tensor([1.0, -1.0, 1.0, -1.0]))[:, None]  # what is better depends on the class alone
    first = (one - two) * sign > 0
    chosen, rejected = torch.where(first, one, two), torch.where(first, two, one)
    config = pfm.FlowConfig(residual=False)
    with caplog.at_level("WARNING", "pfm"):
        pfm.PreferenceFlow.fit(pfm.EncodedPairs(chosen, rejected, context), config, progress=False)
    assert "1200 pairs of only 4 contexts" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", "pfm"):
        pairs = pfm.EncodedPairs(chosen, rejected, context, group=torch.arange(1200))
        flow = pfm.PreferenceFlow.fit(pairs, config, progress=False)
    assert not caplog.text
    moved = flow.transport(one, context)
    assert float(((moved - one) * sign).mean()) > 0.4  # E[max of two standard normals] = 0.564
