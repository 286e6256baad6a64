"""GeneratorPool: whose candidate each is, how many each gives, and what happens when one of them fails."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable

import numpy as np
import pytest
from support.fault_server import FaultServer
from support.letters import LetterEncoder, LinearFlow

from pfm.generators import CachedGenerator, GeneratorPool, OpenAIGenerator, as_generator
from pfm.refiner import Refinement, wrap

PROMPTS = [f"prompt {number}" for number in range(400)]


def short(prompt: str) -> str:
    return f"{prompt} x"


def long(prompt: str) -> str:
    return f"{prompt} xaa"


def broken(prompt: str) -> str:
    raise ConnectionError("no answer")


def test_every_candidate_bears_the_name_of_its_generator():
    pool = GeneratorPool({"short": short, "long": long})
    for prompt, draw in zip(PROMPTS, pool.draws(PROMPTS, 4), strict=True):
        assert draw.tags == pool.allot(prompt, 4)
        assert draw.texts == [(short if tag == "short" else long)(prompt) for tag in draw.tags]
        assert draw.calls == 4


@pytest.mark.parametrize("weights", [None, {"a": 3, "b": 1, "c": 0}, [0.2, 0.3, 0.5]])
def test_shares_follow_the_weights_and_depend_on_seed_and_prompt_alone(weights):
    pool = GeneratorPool({"a": short, "b": long, "c": short}, weights, seed=1)
    expected = np.array(list(pool.weights.values()))
    allotted = [pool.allot(prompt, 8) for prompt in PROMPTS]
    counts = np.array([[names.count(name) for name in "abc"] for names in allotted])
    assert np.abs(counts.mean(0) / 8 - expected).max() < 0.02
    assert np.abs(counts - 8 * expected).max() < 2  # near the weights for each prompt too
    firsts = [names[0] for names in allotted]  # the original is no generator's privilege
    assert abs(firsts.count("a") / len(firsts) - expected[0]) < 0.08
    again = GeneratorPool({"a": long, "b": short, "c": long}, weights, seed=1)
    assert [again.allot(prompt, 8) for prompt in PROMPTS] == allotted
    assert [again.allot(prompt, 4) for prompt in PROMPTS] == [names[:4] for names in allotted]
    assert [again.allot(prompt, 4, 4) for prompt in PROMPTS] == [names[4:] for names in allotted]
    other = GeneratorPool({"a": short, "b": long, "c": short}, weights, seed=2)
    assert [other.allot(prompt, 8) for prompt in PROMPTS] != allotted


def test_the_refinement_tells_whose_text_was_chosen():
    refiner = wrap(GeneratorPool({"short": short, "long": long}), LinearFlow(), encoder=LetterEncoder(), n=4)
    results = refiner.batch(PROMPTS[:20], progress=False)
    for result in results:
        assert result.generators == [("short", "long")[text.endswith("aa")] for text in result.candidates]
        assert result.generator == result.generators[result.index]
        assert result.generator == "long"  # the flow likes "a"
        assert Refinement.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    plain = wrap(short, LinearFlow(), encoder=LetterEncoder(), n=2)("p")
    assert (plain.generator, plain.generators) == (None, [])
    assert "generators" not in plain.to_dict()


def test_one_that_fails_leaves_the_texts_of_the_others():
    pool = GeneratorPool({"good": short, "bad": broken})
    for draw in pool.draws(PROMPTS[:20], 4):
        assert set(draw.tags) == {"good"}
        assert len(draw.texts) == 4 - pool.allot(draw.texts[0].removesuffix(" x"), 4).count("bad")
        assert draw.error == "ConnectionError: no answer (generator 'bad')"
    (draw,) = GeneratorPool([broken]).draws(["p"], 2)
    assert (draw.texts, draw.error) == ([], "ConnectionError: no answer (generator 'broken')")


def test_the_generators_work_at_the_same_time():
    begun = {name: threading.Event() for name in ("one", "two", "three")}

    def named(name: str) -> Callable[[str], str]:
        def reply(prompt: str) -> str:
            begun[name].set()
            assert all(other.wait(60) for other in begun.values())
            return prompt

        return reply

    draws = list(GeneratorPool({name: named(name) for name in begun}).draws(PROMPTS[:4], 6))
    assert [draw.error for draw in draws] == [None] * 4


def test_a_pool_of_servers_counts_all_calls_and_tokens():
    with FaultServer(models=["one"]) as first, FaultServer({"500": 1.0}, models=["two"]) as second:
        one = OpenAIGenerator("one", base_url=first.url, max_retries=0)
        pool = GeneratorPool([one, OpenAIGenerator("two", base_url=second.url, max_retries=0)], weights=[3, 1])
        assert list(pool.generators) == ["one", "two"]
        refiner = wrap(pool, LinearFlow(), encoder=LetterEncoder(), n=4)
        results = asyncio.run(refiner.abatch(PROMPTS[:8], progress=False))
        assert [result.prompt for result in results] == PROMPTS[:8]
        assert sum(result.calls for result in results) == len(first.requests) + len(second.requests)
        assert all(set(result.generators) == {"one"} for result in results)
        assert all(result.error is None or "(generator 'two')" in result.error for result in results)
        assert any(result.error for result in results)
        assert sum(result.usage["total_tokens"] for result in results) == one.usage["total_tokens"]


def test_samples_go_on_where_a_prompt_left_off(tmp_path):
    counted = []

    def numbered(prompt: str) -> str:
        counted.append(prompt)
        return f"{prompt} {len(counted)}"

    pool = GeneratorPool({"a": CachedGenerator(numbered, tmp_path, name="numbered"), "b": long}, seed=3)
    whole = next(pool.draws(["p"], 8))
    parts = [*pool.draws(["p", "p"], 4)]
    assert [text for draw in parts for text in draw.texts] == whole.texts
    assert [tag for draw in parts for tag in draw.tags] == whole.tags
    assert len(counted) == whole.tags.count("a")


def test_names_are_made_where_there_are_none():
    assert list(GeneratorPool([short, long, short]).generators) == ["short #1", "long", "short #2"]
    assert repr(GeneratorPool([short], seed=4)) == "GeneratorPool({'short': 1}, seed=4)"
    local = {"base_url": "http://127.0.0.1:9/v1"}
    pool = GeneratorPool([OpenAIGenerator("m", base_url=local["base_url"])])
    assert pool.describe()["generators"]["m"]["base_url"] == local["base_url"]
    with pytest.raises(AttributeError, match="short of the pool"):
        GeneratorPool([short]).describe()
    assert as_generator(pool) is pool


@pytest.mark.parametrize(
    ("generators", "weights", "message"),
    [
        ([], None, "at least one"),
        ([short], [1, 2], "weights must have one entry a generator: got 2 for 1 generator"),
        ([short, long], [0, 0], "not all 0"),
        ([short, long], [1, -1], "at least 0"),
        ([short, long], [1, float("nan")], "finite"),
        ({"a": short}, {"b": 1}, "must be those of a; got b"),
    ],
)
def test_wrong_pools_are_refused(generators, weights, message):
    with pytest.raises(ValueError, match=message):
        GeneratorPool(generators, weights)
    with pytest.raises(TypeError, match="generator must be"):
        GeneratorPool([3])


def test_a_member_that_breaks_the_protocol_is_found_out():
    class Losing:
        def draws(self, prompts, n):
            return iter([])

    with pytest.raises(ValueError, match="fewer draws"):
        list(GeneratorPool({"losing": Losing(), "good": short}).draws(PROMPTS[:3], 4))
