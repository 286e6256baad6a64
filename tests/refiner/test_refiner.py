"""Generators, the select decoder, and the Refiner that puts them behind one call."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import math
import pickle
import re
import threading
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from support.letters import DIMENSION, LetterEncoder, LinearFlow, refine_one

from pfm.decoders import Select, Selection
from pfm.errors import GenerationError
from pfm.generators import BatchGenerator, CallableGenerator, as_generator
from pfm.refiner import Refinement, wrap

CANDIDATES = ["x", "xa", "xaac", "xaaa", "xccc"]


def partial_of(caught: Any) -> Any:
    """Return the results that an exception carries."""
    return caught.value.partial


def one_after_the_other(texts):
    """Return a generator function that hands out ``texts`` in turn, for any prompt."""
    remaining = iter(texts)
    return lambda prompt: next(remaining)


def letters_of(prompt: str) -> list[str]:
    """Generate from the prompt alone; lives in the module, so that it can be pickled."""
    if "fail" in prompt:
        raise RuntimeError("no luck")
    return [prompt, prompt + "a", prompt + "aa"]


# --- generators -------------------------------------------------------------------------------------------


def test_function_of_one_text_is_called_n_times():
    (draw,) = as_generator(one_after_the_other("uvwxyz")).draws(["p"], 4)
    assert draw.texts == ["u", "v", "w", "x"]
    assert draw.calls == 4
    assert draw.error is None


@pytest.mark.parametrize(("size", "calls"), [(1, 4), (2, 2), (3, 2), (9, 1)])
def test_function_of_lists_is_called_until_n_are_there(size, calls):
    (draw,) = as_generator(lambda prompt: [f"{prompt}{i}" for i in range(size)]).draws(["p"], 4)
    assert len(draw.texts) == 4
    assert draw.calls == calls


def test_function_with_n_is_asked_for_what_is_missing():
    asked = []

    def generate(prompt, *, temperature=1.0, n=1):
        asked.append(n)
        return ["text"] * min(n, 3)

    (draw,) = as_generator(generate).draws(["p"], 8)
    assert asked == [8, 5, 2]
    assert len(draw.texts) == 8
    (draw,) = as_generator(functools.partial(generate, temperature=0.5)).draws(["p"], 2)
    assert asked[-1] == 2


def test_prompt_called_n_is_a_prompt():
    (draw,) = as_generator(lambda n: f"{n}!").draws(["p"], 2)
    assert draw.texts == ["p!", "p!"]


def test_object_with_generate_gets_all_prompts_and_short_rows_again():
    class Object:
        def __init__(self):
            self.asked = []

        def generate(self, prompts, n):
            self.asked.append((list(prompts), n))
            return [[f"{prompt}{i}" for i in range(n if prompt == "full" else 2)] for prompt in prompts]

    generator = Object()
    draws = list(as_generator(generator).draws(["full", "half"], 4))
    assert generator.asked == [(["full", "half"], 4), (["half"], 2)]
    assert [len(draw.texts) for draw in draws] == [4, 4]
    assert [draw.calls for draw in draws] == [1, 2]
    assert sum(1 for _ in BatchGenerator(Object(), prompts_per_call=2).draws(list("abcde"), 1)) == 5


def test_one_bad_prompt_does_not_cost_the_others_of_a_batch_call():
    class Object:
        def generate(self, prompts, n):
            if "bad" in prompts:
                raise ValueError("cannot")
            return [[prompt] * n for prompt in prompts]

    good, bad, other = as_generator(Object()).draws(["good", "bad", "other"], 2)
    assert good.texts == ["good", "good"]
    assert other.texts == ["other", "other"]
    assert (bad.texts, bad.error) == ([], "ValueError: cannot")


def test_wrong_number_of_rows_is_an_error_and_never_shifts_texts():
    class Object:
        def generate(self, prompts, n):
            return [["text"] * n] * (len(prompts) + 1)

    for draw in as_generator(Object()).draws(["p", "q"], 2):
        assert draw.texts == []
        assert draw.error == "ValueError: generate returned 2 rows for 1 prompts"


def test_what_a_generation_error_had_made_is_kept():
    class Object:
        calls = 0

        def generate(self, prompts, n):
            self.calls += 1
            raise GenerationError("server gone", partial=[["a", "b"], ["c"], None])

    generator = Object()
    draws = list(as_generator(generator).draws(["p", "q", "r"], 2))
    assert [draw.texts for draw in draws] == [["a", "b"], ["c"], []]
    assert [draw.dropped for draw in draws] == [0, 0, 0]
    assert [draw.error for draw in draws] == [None, *["GenerationError: server gone"] * 2]
    assert generator.calls == 1

    def function(prompt, n):
        raise GenerationError("server gone", partial=["a", None])

    (draw,) = as_generator(function).draws(["p"], 2)
    assert (draw.texts, draw.dropped, draw.error) == (["a"], 0, "GenerationError: server gone")


@pytest.mark.parametrize("output", [None, 3, {"generated_text": "x"}, b"x", "", " \n\t", "\ud800", float("nan")])
def test_output_that_is_no_text_is_dropped_and_counted(output):
    outputs = iter([output, "good", output, "fine"])
    (draw,) = as_generator(lambda prompt: next(outputs)).draws(["p"], 2)
    assert draw.texts == ["good", "fine"]
    assert (draw.dropped, draw.calls) == (2, 4)


@pytest.mark.parametrize("output", [None, "", [], [None, " "]])
def test_nothing_usable_ends_after_the_cap_with_an_error(output):
    (draw,) = as_generator(lambda prompt: output).draws(["p"], 3)
    assert draw.calls == 6
    assert draw.texts == []
    assert "no usable text from the generator in 6 calls" in str(draw.error)
    (draw,) = CallableGenerator(lambda prompt: output, max_calls=1).draws(["p"], 3)
    assert "in 1 call " in f"{draw.error} "


@pytest.mark.parametrize(
    ("output", "named"),
    [
        (None, "NoneType None"),
        ({"text": "hello"}, "dict {'text': 'hello'}"),
        ([{"generated_text": "hello"}], "dict {'generated_text': 'hello'}"),
        (b"hello", "bytes b'hello'"),
        ({"hello"}, "set {'hello'}"),
        ([["hello"]], "list ['hello']"),
        ("", "str ''"),
    ],
)
def test_the_error_names_what_the_generator_returned(output, named):
    draw = next(as_generator(lambda prompt: output).draws(["p"], 2))
    assert f"the first of them {named}); a generator returns one text or a list of them" in str(draw.error)


def test_an_array_of_texts_is_a_list_of_texts():
    draw = next(as_generator(lambda prompt: np.array(["one", "two"])).draws(["p"], 2))
    assert (draw.texts, draw.calls) == (["one", "two"], 1)
    assert all(type(text) is str for text in draw.texts)


def test_a_function_that_yields_is_refused():
    def parts(prompt):
        yield "a part of a text, or a text?"

    with pytest.raises(TypeError, match="got a function that yields; return a text or a list of texts"):
        as_generator(parts)


def test_exception_ends_the_draw_and_keeps_its_texts():
    def generate(prompt, made=[]):  # noqa: B006
        made.append(prompt)
        if len(made) == 3:
            raise ConnectionError("refused")
        return "text"

    first, second = as_generator(generate).draws(["p", "q"], 4)
    assert (first.texts, first.calls, first.error) == (["text"] * 2, 3, "ConnectionError: refused")
    assert (len(second.texts), second.error) == (4, None)


def test_function_may_change_its_message_list():
    def chat(messages):
        messages.append({"role": "assistant", "content": "hi"})
        messages[0]["content"] += "!"
        return str(len(messages))

    prompt = [{"role": "user", "content": "hello"}]
    (draw,) = as_generator(chat).draws([prompt], 3)
    assert draw.texts == ["2", "2", "2"]
    assert prompt == [{"role": "user", "content": "hello"}]


def test_generate_of_a_callable_generator_raises_with_everything_it_has():
    generator = CallableGenerator(letters_of)
    assert generator.generate(["b"], 2) == [["b", "ba"]]
    with pytest.raises(GenerationError, match=r"prompts\[1\]: RuntimeError: no luck") as caught:
        generator.generate(["b", "fail", "c"], 1)
    assert caught.value.partial == [["b"], [], ["c"]]


class OtherGenerate:
    def generate(self, inputs, generation_config=None, **options):
        return inputs


async def answer_bit_by_bit(prompt):
    yield prompt


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (3, "got int"),
        (None, "got NoneType"),
        (LetterEncoder, "pass LetterEncoder"),
        (OtherGenerate(), "got OtherGenerate"),
        (lambda: "x", r"f\(prompt\)"),
        (lambda prompt, system: "x", "'system'"),
        (answer_bit_by_bit, "async"),
    ],
)
def test_what_is_no_generator_is_refused_at_once(generator, message):
    with pytest.raises(TypeError, match=message):
        as_generator(generator)


def test_limits_of_generators_are_checked():
    with pytest.raises(ValueError, match="max_calls"):
        CallableGenerator(letters_of, max_calls=0)
    with pytest.raises(ValueError, match="prompts_per_call"):
        BatchGenerator(CallableGenerator(letters_of), prompts_per_call=0)
    with pytest.raises(TypeError, match="OtherGenerate"):
        BatchGenerator(OtherGenerate())


# --- select -----------------------------------------------------------------------------------------------


def test_by_win_probability_takes_the_highest():
    result = refine_one(CANDIDATES)
    assert result.text == "xaaa"
    assert result.index == 3
    assert result.changed
    assert result.original == "x"
    assert result.probabilities == pytest.approx([1 / (1 + math.exp(2 - 2 * a)) for a in (0, 1, 2, 3, 0)])
    assert result.win_probability == result.probabilities[3]
    assert result.reason == "changed: highest win probability, win probability +0.863"


def test_by_alignment_takes_the_furthest_but_the_guard_reads_b():
    assert refine_one(CANDIDATES, by="alignment").text == "xccc"
    assert refine_one(["xa", "xccc"], by="alignment").text == "xa"
    assert refine_one(["xa", "xccc"], by="alignment", margin=-1).text == "xccc"


def test_combined_standardises_within_the_prompt():
    candidates = ["x", "xa", "xaacc", "xaaa", "xccc"]
    log_odds, alignment = np.array([-2.0, 0, 2, 4, -2]), np.array([0.0, 0, 2, 0, 3])
    expected = sum(((v - v.mean()) / v.std() for v in (log_odds, alignment)), np.zeros(5)) / 2
    vectors = LetterEncoder().encode(candidates)
    probabilities = LinearFlow().win_probability(vectors).double().numpy()
    selection = Select("combined").decode(LinearFlow(), candidates, vectors, None, probabilities, "p")
    np.testing.assert_allclose(selection.scores, expected, atol=1e-5)
    # The compromise, which is best by neither of the two alone.
    assert refine_one(candidates, by="combined").text == "xaacc"


def test_combined_survives_certain_and_constant_probabilities():
    vectors = LetterEncoder().encode(["x", "xc"])
    for probabilities in (np.array([0.0, 1.0]), np.array([0.5, 0.5])):
        selection = Select("combined").decode(LinearFlow(), ["x", "xc"], vectors, None, probabilities, "p")
        assert np.isfinite(selection.scores).all()
        assert selection.index == 1


@pytest.mark.parametrize(
    ("margin", "changed", "reason"),
    [
        (0.1, True, r"\+0.381"),
        (0.39, False, r"\+0.381 is below the guard margin 0.390"),
        (math.inf, False, "infinite"),
    ],
)
def test_guard_keeps_the_original_below_the_margin(margin, changed, reason):
    for result in (
        refine_one(["x", "xa"], margin=margin),
        refine_one(["x", "xa"], flow=LinearFlow(guard_margin=margin)),
    ):
        assert result.changed == changed
        assert result.text == ("xa" if changed else "x")
        assert result.win_probability == result.probabilities[result.index]
        assert re.search(reason, result.reason)


def test_margin_given_overrules_the_flow_and_is_met_by_equality():
    assert refine_one(["x", "xa"], flow=LinearFlow(guard_margin=math.inf), margin=0.0).changed
    probabilities = np.array([0.25, 0.75])
    vectors = LetterEncoder().encode(["x", "xa"])
    for margin, index in [(0.5, 1), (0.51, 0)]:
        selection = Select(margin=margin).decode(LinearFlow(), ["x", "xa"], vectors, None, probabilities, "p")
        assert selection.index == index


def test_ties_keep_the_original_then_the_lowest_index():
    assert refine_one(["xa", "ya", "za"]).index == 0
    assert refine_one(["x", "ya", "za"]).index == 1
    # A repeated original that is drawn counts as the original: it has changed nothing.
    drawn = [refine_one(["xa", "xa", "ya"], by="sample", seed=seed) for seed in range(30)]
    assert {(result.index, result.changed) for result in drawn} == {(0, False), (2, True)}


@pytest.mark.parametrize("by", ["win_probability", "alignment", "combined", "sample"])
def test_one_candidate_or_equal_ones_are_kept(by):
    assert "only one candidate" in refine_one(["xa"], by=by).reason
    result = refine_one(["xa", "xa"], by=by)
    assert not result.changed
    assert "same text" in result.reason


def test_sample_follows_b_to_the_strength():
    candidates = ["x", "xa", "xaa"]
    b = 1 / (1 + np.exp([2.0, 0.0, -2.0]))
    prompts = [f"prompt {i}" for i in range(2000)]
    for strength in (0.0, 1.0, 3.0):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            refiner = wrap(None, LinearFlow(), encoder=LetterEncoder(), by="sample", strength=strength)
        results = refiner.refine([candidates] * len(prompts), prompts)
        shares = np.bincount([result.index for result in results], minlength=3) / len(prompts)
        np.testing.assert_allclose(shares, b**strength / (b**strength).sum(), atol=0.03)


def test_sample_ignores_the_guard_and_depends_on_seed_and_prompt_only():
    candidates = ["x", "xa", "xaa", "xaaa"]
    prompts = [f"prompt {i}" for i in range(40)]

    def drawn(seed, prompts):
        flow = LinearFlow(guard_margin=math.inf)
        refiner = wrap(None, flow, encoder=LetterEncoder(), by="sample", seed=seed)
        return {r.prompt: r.index for r in refiner.refine([candidates] * len(prompts), prompts)}

    together = drawn(0, prompts)
    assert len(set(together.values())) > 1
    assert together == drawn(0, prompts[::-1])
    assert {k: together[k] for k in prompts[:3]} == drawn(0, prompts[:3])
    assert together != drawn(1, prompts)


def test_sample_with_all_probabilities_zero_keeps_the_original():
    selection = Select("sample").decode(LinearFlow(), ["x", "y"], torch.zeros(2, 6), None, np.zeros(2), "p")
    assert selection.index == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "nearest"}, "by must be one of win_probability"),
        ({"margin": math.nan}, "margin"),
        ({"strength": -1.0}, "strength"),
        ({"strength": math.inf}, "strength"),
    ],
)
def test_select_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        wrap(letters_of, LinearFlow(), encoder=LetterEncoder(), **options)


def test_strength_without_effect_is_said():
    with pytest.warns(UserWarning, match="no effect"):
        wrap(letters_of, LinearFlow(), encoder=LetterEncoder(), strength=0.5)


# --- wrap -------------------------------------------------------------------------------------------------


def test_encoder_of_another_dimension_is_refused():
    flow = LinearFlow(encoder={"name": "minilm", "revision": "c9745ed"})
    flow.metadata["dimension"] = 384
    with pytest.raises(ValueError, match=r"dimension 6.*dimension 384.*minilm \(revision c9745ed\)"):
        wrap(letters_of, flow, encoder=LetterEncoder())


def test_other_encoder_of_the_same_dimension_is_warned_about():
    with pytest.warns(UserWarning, match="another encoder.*name 'other' against 'letters'") as caught:
        wrap(letters_of, LinearFlow(encoder={"name": "other"}), encoder=LetterEncoder())
    assert caught[0].filename == __file__


@pytest.mark.parametrize("known", [{}, {"dtype": "bfloat16"}, {"added in a later version": True}])
def test_same_encoder_is_not_warned_about(known):
    flow = LinearFlow(encoder={**LetterEncoder().describe(), **known})
    encoder: Any = LetterEncoder()
    encoder.describe = lambda: {**LetterEncoder().describe(), "dtype": "float32"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(letters_of, flow, encoder=encoder)


def test_encoder_that_returns_another_shape_is_refused():
    class Short(LetterEncoder):
        def encode(self, texts, *, progress=False):
            return super().encode(texts)[:, :4]

    with pytest.raises(ValueError, match=r"shape \(3, 6\).*got \(3, 4\)") as caught:
        wrap(letters_of, LinearFlow(), encoder=Short(), n=3).batch(["p"], progress=False)
    assert partial_of(caught)[0].candidates == ["p", "pa", "paa"]


@pytest.mark.parametrize("n", [0, -1, 2.5, True])
def test_n_below_one_or_no_whole_number_is_refused(n):
    with pytest.raises(ValueError, match="n must be a whole number of at least 1"):
        wrap(letters_of, LinearFlow(), encoder=LetterEncoder(), n=n)
    with pytest.raises(ValueError, match="n must be a whole number of at least 1"):
        wrap(letters_of, LinearFlow(), encoder=LetterEncoder()).candidates(["p"], n)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flow": 3}, "flow must be"),
        ({"encoder": "minilm"}, "encoder must have"),
        ({"generator": 3}, "generator must be"),
        ({"decoder": 3}, "decoder must be"),
        ({"decoder": Select}, "decoder must be"),
    ],
)
def test_wrap_refuses_wrong_types(arguments, message):
    given = {"generator": letters_of, "flow": LinearFlow(), "encoder": LetterEncoder(), **arguments}
    with pytest.raises(TypeError, match=message):
        wrap(given.pop("generator"), given.pop("flow"), **given)


class LongestDecoder:
    def decode(self, flow, candidates, vectors, context, probabilities, key):
        index = max(range(len(candidates)), key=lambda row: len(candidates[row]))
        return Selection(index, index != 0, [float(len(text)) for text in candidates], f"longest for {key}")


def test_decoder_may_be_an_object():
    result = refine_one(["x", "xyz", "xa"], decoder=LongestDecoder())
    assert (result.text, result.reason) == ("xyz", "longest for p")
    assert refine_one(CANDIDATES, decoder=Select("alignment")).text == "xccc"
    with pytest.raises(ValueError, match="decoder must be 'select'"):
        refine_one(["x"], decoder="nearest")
    with pytest.raises(ValueError, match="by, seed belong to decoder='select'"):
        refine_one(["x"], decoder=LongestDecoder(), by="alignment", seed=3)


# --- refiner ----------------------------------------------------------------------------------------------


def test_refiner_draws_judges_and_explains():
    refiner = wrap(letters_of, LinearFlow(), encoder=LetterEncoder(), n=3)
    result = refiner("b")
    assert isinstance(result, Refinement)
    assert (result.prompt, result.original, result.text) == ("b", "b", "baa")
    assert result.candidates == ["b", "ba", "baa"]
    assert (result.index, result.changed, result.calls, result.error) == (2, True, 1, None)
    assert result.seconds > 0


def test_batch_keeps_the_order_and_judges_all_rows_in_one_call():
    flow, encoder = LinearFlow(context_dimension=DIMENSION), LetterEncoder()
    refiner = wrap(letters_of, flow, encoder=encoder, n=3)
    results = refiner.batch(["b", "x", "bb", "c"], progress=False)
    assert [result.prompt for result in results] == ["b", "x", "bb", "c"]
    # "a" is preferred where the prompt holds a "b" and refused elsewhere: contexts reach the right rows.
    assert [result.text for result in results] == ["baa", "x", "bbaa", "c"]
    assert flow.calls == 1
    assert [len(texts) for texts in encoder.encoded] == [12, 4]


def test_result_does_not_depend_on_batch_neighbours():
    refiner = wrap(letters_of, LinearFlow(context_dimension=DIMENSION), encoder=LetterEncoder(), n=3)
    prompts = ["b", "fail", "x", "bb"]
    together = refiner.batch(prompts, progress=False)
    for prompt, result in zip(prompts, together, strict=True):
        (alone,) = refiner.batch([prompt], progress=False)
        assert {**alone.to_dict(), "seconds": 0} == {**result.to_dict(), "seconds": 0}


def test_prompts_are_encoded_by_encode_prompts_where_it_exists():
    class TwoSided(LetterEncoder):
        def encode_prompts(self, texts, *, progress=False):
            return torch.ones(len(texts), 3)

    refiner = wrap(letters_of, LinearFlow(context_dimension=3), encoder=TwoSided(), n=3)
    assert refiner("x").text == "xaa"


def test_conversations_are_prompts():
    seen = []

    def chat(messages):
        seen.append(messages)
        return "xa"

    flow = LinearFlow(context_dimension=DIMENSION)
    refiner = wrap(chat, flow, encoder=LetterEncoder(), n=2)
    prompt = [{"role": "system", "content": "kind"}, {"role": "user", "content": "hello b"}]
    result = refiner(prompt)
    assert seen == [prompt, prompt]
    assert result.prompt == prompt
    assert result.win_probability == pytest.approx(0.5)
    json.dumps(result.to_dict())


def test_fewer_than_n_is_stated():
    refiner = wrap(lambda prompt: ["x", "", "xa"][: 3 if prompt == "p" else 0], LinearFlow(), encoder=LetterEncoder())
    refiner.generator.max_calls = 2
    result = refiner("p")
    assert result.candidates == ["x", "xa", "x", "xa"]
    assert result.reason.endswith("4 of 8 candidates after 2 calls; 2 outputs dropped: empty or not text")
    assert result.text == "xa"
    assert result.error is None


def test_generator_failure_is_recorded_and_the_rest_unharmed():
    refiner = wrap(letters_of, LinearFlow(), encoder=LetterEncoder(), n=3)
    first, failed, last = refiner.batch(["b", "fail", "c"], progress=False)
    assert (first.text, last.text) == ("baa", "caa")
    assert failed.error == "RuntimeError: no luck"
    assert (failed.text, failed.original, failed.candidates, failed.index) == ("", "", [], -1)
    assert math.isnan(failed.win_probability)
    assert failed.reason == "no candidate"


def test_a_single_call_without_candidate_raises():
    refiner = wrap(letters_of, LinearFlow(), encoder=LetterEncoder())
    with pytest.raises(GenerationError, match="RuntimeError: no luck") as caught:
        refiner("fail")
    assert partial_of(caught).prompt == "fail"


def test_candidates_before_a_failure_are_refined():
    texts = iter(["x", "xa"])

    def generate(prompt):
        return next(texts, None) or (_ for _ in ()).throw(TimeoutError("too slow"))

    result = wrap(generate, LinearFlow(), encoder=LetterEncoder(), n=4)("p")
    assert result.text == "xa"
    assert result.error == "TimeoutError: too slow"
    assert "2 of 4 candidates after 3 calls" in result.reason


class HoledEncoder(LetterEncoder):
    """Return NaN for texts with a question mark."""

    def encode(self, texts, *, progress=False):
        vectors = super().encode(texts)
        vectors[["?" in text for text in texts]] = math.nan
        return vectors


def test_nan_from_the_encoder_keeps_the_original_of_that_prompt():
    refiner = wrap(None, LinearFlow(context_dimension=DIMENSION), encoder=HoledEncoder())
    outputs = [["x", "xa"], ["x", "xa?"], ["x", "xa"]]
    good, candidate, prompt = refiner.refine(outputs, ["b", "b", "b?"])
    assert (good.text, good.error) == ("xa", None)
    for result, holes in [(candidate, "candidates 1"), (prompt, "candidates 0, 1")]:
        assert (result.text, result.changed) == ("x", False)
        assert "NaN" in str(result.error)
        assert str(result.error).endswith(holes)
        assert "not finite" in result.reason
    assert candidate.win_probability == candidate.probabilities[0] > 0
    assert math.isnan(candidate.probabilities[1])
    assert math.isnan(prompt.win_probability)


def test_refine_takes_outputs_made_elsewhere():
    refiner = wrap(None, LinearFlow(), encoder=LetterEncoder())
    listed, single = refiner.refine([["x", "xa"], "xaa"], ["p", "q"])
    assert (listed.text, listed.calls) == ("xa", 0)
    assert (single.text, single.changed, single.candidates) == ("xaa", False, ["xaa"])
    assert single.win_probability == pytest.approx(1 / (1 + math.exp(-2)))
    assert "only one candidate" in single.reason
    assert refiner.refine([], []) == []


def test_refine_states_what_it_cannot_use():
    refiner = wrap(None, LinearFlow(), encoder=LetterEncoder())
    outputs: list[Any] = [[], None, ["", "x", 3, "xa"]]
    empty, missing, mixed = refiner.refine(outputs, ["p", "q", "r"])
    for result in (empty, missing):
        assert result.error == "GenerationError: no usable text from the outputs given"
    assert (mixed.original, mixed.text) == ("x", "xa")
    assert mixed.reason.endswith("2 outputs dropped: empty or not text")


def test_refine_refuses_unequal_lengths_and_wrong_types():
    refiner: Any = wrap(None, LinearFlow(), encoder=LetterEncoder())
    with pytest.raises(ValueError, match="2 outputs and 1 prompts"):
        refiner.refine(["x", "y"], ["p"])
    with pytest.raises(TypeError, match=r"outputs\[1\] must be a text or a list of texts, got int 3"):
        refiner.refine(["x", 3], ["p", "q"])
    with pytest.raises(TypeError, match="outputs must be a list"):
        refiner.refine("x", ["p"])
    with pytest.raises(TypeError, match="prompts must be a list"):
        refiner.refine(["x"], "p")


def test_wrong_prompts_are_refused_before_anything_is_generated():
    calls = []
    refiner: Any = wrap(lambda prompt: calls.append(prompt) or "x", LinearFlow(), encoder=LetterEncoder())
    with pytest.raises(TypeError, match=r"prompts\[1\] must be a text or a list of messages.*got int 3"):
        refiner.batch(["p", 3])
    with pytest.raises(TypeError, match=r"prompts\[0\]"):
        refiner.batch([[{"role": "user"}]])
    with pytest.raises(TypeError, match=r"\.map_batch"):
        refiner({"prompt": ["p"]})
    with pytest.raises(TypeError, match=r"\.batch"):
        refiner(["p", "q"])
    assert calls == []


@pytest.mark.parametrize("prompt", ["", "  ", "\ud800", [{"role": "user", "content": ""}]])
def test_empty_prompt_is_refused_where_it_must_be_encoded(prompt):
    refiner = wrap(lambda prompt: "x", LinearFlow(context_dimension=DIMENSION), encoder=LetterEncoder())
    with pytest.raises(ValueError, match=r"prompts\[1\] must be text that can be encoded"):
        refiner.batch(["p", prompt], progress=False)
    assert wrap(lambda prompt: "x", LinearFlow(), encoder=LetterEncoder())(prompt).text == "x"


def test_without_generator_only_refine_works():
    refiner = wrap(None, LinearFlow(), encoder=LetterEncoder())
    for call in (lambda: refiner("p"), lambda: refiner.batch(["p"]), lambda: refiner.candidates(["p"], 1)):
        with pytest.raises(ValueError, match="no generator"):
            call()


def test_candidates_are_fresh_draws():
    refiner = wrap(one_after_the_other("uvwxyz"), LinearFlow(), encoder=LetterEncoder(), n=2)
    assert refiner.candidates(["p"], 2) == [["u", "v"]]
    assert refiner.candidates(["p", "q"], 1) == [["w"], ["x"]]


def test_candidates_log_what_failed(caplog):
    refiner = wrap(letters_of, LinearFlow(), encoder=LetterEncoder())
    assert refiner.candidates(["b", "fail"], 1) == [["b"], []]
    assert "prompts[1]: 0 of 1 candidates: RuntimeError: no luck" in caplog.text


def test_interrupt_keeps_what_is_finished():
    def generate(prompt):
        if prompt == "stop":
            raise KeyboardInterrupt
        return [prompt, prompt + "a"]

    saved = []
    refiner = wrap(generate, LinearFlow(), encoder=LetterEncoder(), n=2)
    with pytest.raises(KeyboardInterrupt) as caught:
        refiner.batch(["b", "c", "stop", "d"], progress=False, on_result=saved.append)
    assert [result.text for result in saved] == ["ba", "ca"]
    assert partial_of(caught) == saved


def test_failing_encoder_hands_back_the_candidates():
    class Failing(LetterEncoder):
        def encode(self, texts, *, progress=False):
            raise ConnectionError("embedding server gone")

    saved = []
    refiner = wrap(letters_of, LinearFlow(), encoder=Failing(), n=3)
    with pytest.raises(ConnectionError) as caught:
        refiner.batch(["b", "c"], progress=False, on_result=saved.append)
    assert saved == []
    assert [result.candidates[1] for result in partial_of(caught)] == ["ba", "ca"]
    assert partial_of(caught)[0].error == "ConnectionError: embedding server gone"


def test_results_of_a_slow_generator_arrive_while_it_goes_on(monkeypatch):
    monkeypatch.setattr("pfm.refiner.run.WAITING_SECONDS", 0.01)
    saved, seen = [], []

    def generate(prompt):
        seen.append(len(saved))
        time.sleep(0.02)
        return prompt

    refiner = wrap(generate, LinearFlow(), encoder=LetterEncoder(), n=1)
    results = refiner.batch(["b", "c", "d"], progress=False, on_result=saved.append)
    assert seen == [0, 1, 2]
    assert results == saved


def test_large_batches_are_judged_in_portions(monkeypatch):
    monkeypatch.setattr("pfm.refiner.run.WAITING_CANDIDATES", 6)
    flow = LinearFlow()
    prompts = [f"b{i}" for i in range(7)]
    results = wrap(letters_of, flow, encoder=LetterEncoder(), n=3).batch(prompts, progress=False)
    assert flow.calls == 4
    assert [result.text for result in results] == [prompt + "aa" for prompt in prompts]


def test_generator_that_loses_prompts_is_found_out():
    class Losing:
        def draws(self, prompts, n):
            return CallableGenerator(letters_of).draws(prompts[1:], n)

    with pytest.raises(ValueError, match="1 draws for 2 prompts"):
        wrap(Losing(), LinearFlow(), encoder=LetterEncoder()).batch(["b", "c"], progress=False)


def test_progress_bar_can_be_silenced(capsys, monkeypatch):
    refiner = wrap(letters_of, LinearFlow(), encoder=LetterEncoder())
    refiner.batch(["b"])
    assert "Refining" in capsys.readouterr().err
    refiner.batch(["b"], progress=False)
    assert capsys.readouterr().err == ""


def test_abatch_leaves_the_event_loop_free():
    asked, go_on = threading.Event(), threading.Event()

    def reply(prompt):
        asked.set()
        assert go_on.wait(60)
        return prompt

    refiner = wrap(reply, LinearFlow(), encoder=LetterEncoder(), n=1)

    async def work():
        task = asyncio.create_task(refiner.abatch(["b", "c"], progress=False))
        while not asked.is_set():
            await asyncio.sleep(0.001)
        go_on.set()  # which a loop that is held up could not
        return await task

    results = asyncio.run(work())
    assert [result.text for result in results] == ["b", "c"]
    assert [result.error for result in results] == [None, None]


def test_refinement_to_json_and_back():
    refiner = wrap(letters_of, LinearFlow(), encoder=LetterEncoder(), n=3)
    for result in refiner.batch(["b", "fail"], progress=False):
        line = json.dumps(result.to_dict(), allow_nan=False)
        again = Refinement.from_dict({**json.loads(line), "row": 7})
        assert again.to_dict() == result.to_dict()
    assert math.isnan(again.win_probability)
    with pytest.raises(ValueError, match="keys text, original"):
        Refinement.from_dict({"prompt": "p"})


def test_own_cost_is_below_a_millisecond_a_response():
    refiner = wrap(None, LinearFlow(context_dimension=DIMENSION), encoder=LetterEncoder(), by="combined")
    outputs = [[hashlib.sha256(f"{i} {j}".encode()).hexdigest() for j in range(8)] for i in range(250)]
    prompts = [f"b {i}" for i in range(250)]
    started = time.process_time()
    refiner.refine(outputs, prompts)
    assert (time.process_time() - started) / 2000 < 1e-3


# --- columns ----------------------------------------------------------------------------------------------


def test_refiner_survives_pickle():
    refiner = wrap(letters_of, LinearFlow(), encoder=LetterEncoder(), n=3)
    again = pickle.loads(pickle.dumps(refiner.map_batch))
    assert again({"prompt": ["b", "c"]}) == refiner.map_batch({"prompt": ["b", "c"]})


def test_map_batch_adds_columns():
    refiner = wrap(letters_of, LinearFlow(), encoder=LetterEncoder(), n=3)
    batch = {"prompt": np.array(["b", "fail"], dtype=object), "id": [7, 8]}
    out = refiner.map_batch(batch)
    assert set(batch) == {"prompt", "id"}
    assert out["id"] == [7, 8]
    assert out["refined"] == ["baa", ""]
    assert out["original"] == ["b", ""]
    assert out["changed"] == [True, False]
    assert out["error"] == ["", "RuntimeError: no luck"]
    assert math.isnan(out["win_probability"][1])
    out = refiner.map_batch({"prompt": ["p"], "candidates": [np.array(["x", "xa"], dtype=object)]})
    assert out["refined"] == ["xa"]
    with pytest.raises(ValueError, match="column 'prompt', got text"):
        refiner.map_batch({"text": ["p"]})


def test_map_batch_runs_unchanged_in_datasets(tmp_path):
    import datasets

    refiner = wrap(letters_of, LinearFlow(), encoder=LetterEncoder(), n=3)
    rows = datasets.Dataset.from_dict({"prompt": ["fail", "b", "c", "d"], "id": [0, 1, 2, 3]})
    mapped = rows.map(refiner.map_batch, batched=True, batch_size=1, cache_file_name=str(tmp_path / "a.arrow"))
    assert mapped["refined"][:] == ["", "baa", "caa", "daa"]
    assert mapped["id"][:] == [0, 1, 2, 3]
    assert mapped.features["win_probability"].dtype == "float64"

    messages = [[{"role": "user", "content": "b"}], [{"role": "user", "content": "c"}]]
    rows = datasets.Dataset.from_dict({"prompt": messages, "candidates": [["x", "xa"], ["y"]]})
    mapped = rows.map(refiner.map_batch, batched=True, cache_file_name=str(tmp_path / "b.arrow"))
    assert mapped["refined"][:] == ["xa", "y"]
    assert mapped["changed"][:] == [True, False]
