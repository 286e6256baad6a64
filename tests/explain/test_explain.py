"""What a flow is said to prefer is what its labels were made of, and nothing where they were made of noise."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.resources import files
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pfm import FlowConfig, PreferenceFlow, PreferencePairs
from pfm.cli import app
from pfm.encoders import SurfaceEncoder
from pfm.explain import Explanation, explain
from pfm.explain.changes import moved_traits
from pfm.explain.directions import PRIOR_TOKENS, contrastive_terms
from pfm.explain.traits import TRAITS, measure_traits

ENCODER = SurfaceEncoder(provides_context=True)
CONFIG = FlowConfig(residual=False)


def real_texts(prompts: int = 100) -> dict[str, list[str]]:
    texts: dict[str, dict[str, None]] = {}
    for line in (files("pfm") / "assets" / "preferences.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts.setdefault(row["prompt"], {}).update({row["chosen"]: None, row["rejected"]: None})
    return {prompt: list(found) for prompt, found in list(texts.items())[:prompts]}


def constructed(score, **options) -> PreferencePairs:
    texts = real_texts()
    scores = [[float(score(text)) for text in found] for found in texts.values()]
    return PreferencePairs.from_scores(
        list(texts), list(texts.values()), scores, max_pairs_per_prompt=5, on_bad_rows="drop", **options
    )


@dataclass
class Told:
    flow: PreferenceFlow
    held: PreferencePairs
    found: Explanation

    def trait(self, name: str):
        return next(trait for trait in self.found.traits if trait.name == name)


def told(pairs: PreferencePairs) -> Told:
    fitted, held = pairs.split(0.4, 0)
    flow = PreferenceFlow.fit(fitted.encode(ENCODER, progress=False), CONFIG, progress=False)
    return Told(flow, held, explain(flow, held, ENCODER, resamples=300, progress=False))


@pytest.fixture(scope="module")
def longer() -> Told:
    return told(constructed(lambda text: len(text.split())))


@pytest.fixture(scope="module")
def questions() -> Told:
    return told(constructed(lambda text: text.count("?")))


@pytest.fixture(scope="module")
def shuffled() -> Told:
    return told(constructed(lambda text: len(text.split())).shuffle_labels(0))


def test_longer_wins_is_told_as_longer_and_warned_of(longer: Told) -> None:
    found = longer.found
    assert found.confirmed
    assert found.summary.startswith("Prefers longer (+")
    length = longer.trait("words")
    assert found.traits[0] is length
    assert length.confirmed
    assert 0.3 < length.moved.value < 0.9
    assert length.moved.low > 0
    assert abs(length.moved.value - length.labelled.value) < 0.2
    assert found.length_share is not None
    assert found.length_share.value > 0.8
    assert "Length explains most of b" in found.warnings[0]
    # What merely comes with the length is said to.
    sentences = longer.trait("sentences")
    assert sentences.with_length
    assert "sd), more sentences" not in found.summary
    assert found.directions[0].kind == "mean"
    assert found.directions[0].traits[0][0] == "longer"


def test_labels_of_the_other_sign_do_not_confirm_it(longer: Told) -> None:
    found = explain(longer.flow, longer.held.swap(), ENCODER, resamples=100, progress=False)
    assert not found.confirmed
    assert "The given pairs do not confirm it." in found.reasons


def test_questions_win_is_told_as_questions(questions: Told) -> None:
    found = questions.found
    assert found.confirmed
    assert found.summary.startswith("Prefers more questions (+")
    assert not questions.trait("questions").with_length
    assert found.length_share is not None
    assert found.length_share.value < 0.5
    assert not any("Length explains" in warning for warning in found.warnings)
    mean, win = found.directions[0], found.directions[1]
    assert mean.moves is not None
    assert 0 < mean.moves < 2  # times as far as answers lie from their mean
    assert mean.traits[0][0] == "more questions"
    assert mean.more[0].text == "?"
    assert win.more[0].text == "?"
    for contrast in win.contrasts:
        assert contrast.high.count("?") > contrast.low.count("?")
        assert contrast.high_probability > contrast.low_probability


def test_shuffled_labels_have_no_confirmed_direction(shuffled: Told, longer: Told) -> None:
    for found in (shuffled.found, explain(shuffled.flow, longer.held, ENCODER, resamples=100, progress=False)):
        assert not found.confirmed
        assert found.summary.startswith("No confirmed direction")
        assert not found.directions
        assert not found.warnings
    assert not any(trait.confirmed for trait in shuffled.found.traits)


def test_picked_is_the_change_under_sampling_by_b(longer: Told) -> None:
    rows = list(dict.fromkeys((p, t) for p, *ts in zip(longer.held.prompts, longer.held.chosen, longer.held.rejected,
                                                       strict=True) for t in ts))  # fmt: skip
    texts, prompts = [text for _, text in rows], [prompt for prompt, _ in rows]
    b = longer.flow.win_probability(ENCODER.encode(texts), ENCODER.encode(prompts)).double().numpy()
    trait = measure_traits(texts)[:, list(TRAITS).index("words")]
    centred = trait.copy()
    for prompt in set(prompts):
        of = np.array([other == prompt for other in prompts])
        centred[of] -= trait[of].mean()
    top = bottom = 0.0
    for prompt in set(prompts):
        of = np.array([other == prompt for other in prompts])
        top += b[of].sum() * (np.average(trait[of], weights=b[of]) - trait[of].mean())
        bottom += b[of].sum()
    assert longer.trait("words").picked.value == pytest.approx(top / bottom / centred.std(), rel=1e-5)


def test_moved_is_the_displacement_of_a_trait_that_the_embedding_holds(questions: Told) -> None:
    """The surface encoder's vector has the trait as a coordinate: the regression must find it, and only it."""
    held = questions.held
    rows = list(dict.fromkeys((p, t) for p, *ts in zip(held.prompts, held.chosen, held.rejected, strict=True)
                              for t in ts))  # fmt: skip
    texts, prompts = [text for _, text in rows], [prompt for prompt, _ in rows]
    y = ENCODER.encode(texts)
    column = ENCODER.feature_names.index("questions")
    step = (questions.flow.transport(y, ENCODER.encode(prompts)) - y)[:, column].double().mean()
    centred = y[:, column].double().clone()
    for prompt in set(prompts):
        of = torch.tensor([other == prompt for other in prompts])
        centred[of] -= centred[of].mean()
    trait = questions.trait("questions")
    assert trait.told > 0.999
    assert trait.moved.value == pytest.approx(float(step / centred.square().mean().sqrt()), rel=0.02)


def test_the_error_of_a_regression_is_that_of_fits_on_other_prompts() -> None:
    rng = np.random.default_rng(0)
    place, step = rng.normal(size=(300, 6)), np.tile(rng.normal(size=6), (300, 1))
    weights, noise = rng.normal(size=6), rng.normal(size=300)
    traits = np.stack([place @ weights, place @ weights + 2 * noise], axis=1)
    changes, errors, told = moved_traits(place, step, traits, cast(Any, SimpleNamespace(unit=np.arange(300))), 0)
    assert told[0] > 0.999 > 0.9 > told[1]
    assert changes[:, 0].mean() == pytest.approx(step[0] @ weights, rel=0.01)
    assert errors[0] < 0.01 * errors[1]
    # By the theory of least squares, sigma |S^-1/2 step|.
    expected = 2 * math.sqrt(step[0] @ np.linalg.solve(place.T @ place, step[0]))
    assert 0.4 * expected < errors[1] < 2.5 * expected


def test_the_order_of_the_pairs_does_not_matter(questions: Told) -> None:
    order = np.random.default_rng(0).permutation(len(questions.held))
    found = explain(questions.flow, questions.held.select(order), ENCODER, resamples=300, progress=False)
    for trait in found.traits:
        assert trait.picked.value == pytest.approx(questions.trait(trait.name).picked.value, abs=1e-6)
        assert trait.picked.low == pytest.approx(questions.trait(trait.name).picked.low, abs=1e-6)
        assert trait.moved.value == pytest.approx(questions.trait(trait.name).moved.value, abs=1e-4)


def test_contrastive_terms_follow_the_paper() -> None:
    high = [["good", "good", "tea", "tea", "tea"]]
    low = [["bad", "tea", "tea", "tea", "good"]]
    more, less = contrastive_terms(high, low, high + low, count=3)
    assert [term.text for term in more + less] == []  # so little is no evidence
    more, less = contrastive_terms(high * 100, low * 100, (high + low) * 100, count=3)
    assert more[0].text == "good"
    assert less[0].text == "bad"
    # By hand for "good": 200 of 500 against 100 of 500.
    prior = PRIOR_TOKENS * 300 / 1000
    delta = math.log((200 + prior) / (500 + PRIOR_TOKENS - 200 - prior)) - math.log(
        (100 + prior) / (500 + PRIOR_TOKENS - 100 - prior)
    )
    assert more[0].z == pytest.approx(delta / math.sqrt(1 / (200 + prior) + 1 / (100 + prior)))
    assert more[0].counts == (200, 100)
    there, back = contrastive_terms(high * 100, low * 100, (high + low) * 100), contrastive_terms(
        low * 100, high * 100, (high + low) * 100
    )  # fmt: skip
    assert [(t.text, round(t.z, 9)) for t in there[0]] == [(t.text, round(-t.z, 9)) for t in back[1]]


def test_texts_are_data_on_the_page(longer: Told, tmp_path) -> None:
    evil = "<script>alert(1)</script> & <img src=x>"
    rows = [{**row, "chosen": f"{row['chosen']} {evil}", "rejected": f"{evil}"} for row in longer.held][:60]
    found = explain(longer.flow, PreferencePairs.from_rows(rows), ENCODER, resamples=50, progress=False)
    assert found.confirmed
    assert found.directions[0].contrasts
    found.save_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "<img" not in page
    assert "Content-Security-Policy" in page


def test_one_prompt_and_few_outputs_are_said(longer: Told) -> None:
    one = longer.held.select([i for i, p in enumerate(longer.held.prompts) if p == longer.held.prompts[0]])
    found = explain(longer.flow, one, ENCODER, resamples=50, progress=False)
    assert any("one prompt" in warning for warning in found.warnings)
    found = explain(longer.flow, longer.held, ENCODER, max_outputs=90, resamples=50, progress=False)
    assert found.settings["outputs"] <= 90
    assert any("drawn at random" in warning for warning in found.warnings)


def test_what_does_not_fit_is_refused(longer: Told) -> None:
    with pytest.raises(ValueError, match="directions must be a whole number of at least 0: got -1"):
        explain(longer.flow, longer.held, ENCODER, directions=-1)

    class Half(SurfaceEncoder):
        def encode(self, texts, *, progress: bool = False) -> torch.Tensor:
            return super().encode(texts)[:, :14]

    with pytest.raises(ValueError, match=r"encoder must give outputs \(28,\) and contexts of 28 values"):
        explain(longer.flow, longer.held, Half(), progress=False)


def test_the_command(longer: Told, shuffled: Told, tmp_path) -> None:
    longer.flow.save_pretrained(tmp_path / "flow")
    shuffled.flow.save_pretrained(tmp_path / "noise")
    longer.held.to_jsonl(tmp_path / "held.jsonl")
    run = CliRunner()
    options = [str(tmp_path / "held.jsonl"), "--encoder", "surface", "--no-progress"]
    outs = ["--out", str(tmp_path / "new" / "a.html"), "--out", str(tmp_path / "new" / "a.json")]
    result = run.invoke(app, ["explain", str(tmp_path / "flow"), *options, *outs])
    assert result.exit_code == 0, result.output
    assert "Prefers longer" in result.output
    assert "Length explains most of b" in result.output
    found = json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8"))
    assert found["confirmed"]
    assert found["traits"][0]["name"] == "words"
    assert "Prefers longer" in (tmp_path / "new" / "a.html").read_text(encoding="utf-8")
    result = run.invoke(app, ["explain", str(tmp_path / "noise"), *options])
    assert result.exit_code == 0
    assert "No confirmed direction" in result.output
    result = run.invoke(app, ["explain", str(tmp_path / "flow"), *options, "--out", "a.txt"])
    assert result.exit_code == 2
    assert ".html or .json" in result.output


def test_a_prompt_is_taken_whole_however_it_is_written() -> None:
    from pfm.explain.outputs import some_prompts

    spellings = ("Why {}?", "why {}? ", "Why  {}\uff1f")
    rows = [
        {"prompt": spelling.format(number), "chosen": f"a {number} {row}", "rejected": f"b {number} {row}"}
        for number in range(20)
        for row, spelling in enumerate(spellings)
    ]
    pairs = PreferencePairs.from_rows(rows)
    kept = some_prompts(pairs, 60, 0)
    assert kept is not None
    whole = [sum(number // 3 == prompt for number in kept) for prompt in range(20)]
    assert whole.count(3) == 10  # of six outputs each
    assert set(whole) == {0, 3}
    again = [{**row, "chosen": "a", "rejected": "b"} for row in rows]
    assert some_prompts(PreferencePairs.from_rows(again), 40, 0) is None  # two outputs to each of twenty prompts
