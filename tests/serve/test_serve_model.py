"""End to end: a real model behind `transformers serve`, refined by `pfm serve`, asked by the openai client."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from support.chat_server import running
from support.tiny_model import ASK, reviews, train, transformers_serve

import pfm
from pfm.serve import ServeConfig, create_app

MESSAGES: Any = [{"role": "user", "content": ASK}]


class WordJudge:
    """Scores a review by how much likelier its words are in liked than in disliked reviews (naive Bayes)."""

    def __init__(self, rows: list[tuple[str, int]]) -> None:
        counts = {
            label: Counter(w for text, own in rows if own == label for w in set(text.split())) for label in (0, 1)
        }
        totals = {label: sum(own == label for _, own in rows) for label in (0, 1)}
        self.weights = {
            word: math.log((counts[1][word] + 1) / (totals[1] + 2)) - math.log((counts[0][word] + 1) / (totals[0] + 2))
            for word in counts[0] | counts[1]
        }

    def __call__(self, text: str) -> float:
        return sum(self.weights.get(word, 0.0) for word in set(text.split()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:all pairs belong to one prompt")  # as they must, this model knows no other
def test_a_real_model_writes_reviews_that_are_liked_more(tmp_path):
    rows = reviews()
    judge = WordJudge(rows[:5000])  # of reviews that neither the flow nor the model has seen
    model = train(tmp_path / "model", [text for text, _ in rows[5000:]])
    short = [(text, label) for text, label in rows[5000:] if len(text.split()) <= 16]
    liked, disliked = ([text for text, own in short if own == label][:300] for label in (1, 0))
    pairs = pfm.PreferencePairs.from_rows(
        {"prompt": ASK, "chosen": good, "rejected": bad} for good, bad in zip(liked, disliked, strict=True)
    )
    encoder = pfm.encoders.SentenceEncoder("minilm", cache=False)
    encoded = pairs.encode(encoder, context=False, progress=False)
    config = pfm.FlowConfig(residual=False)
    flow = pfm.PreferenceFlow.fit(encoded, config, progress=False)
    control = pfm.PreferenceFlow.fit(encoded.shuffle_labels(seed=0), config, progress=False)

    def settings(upstream: str) -> ServeConfig:
        # One call at a time: that server seeds one source of randomness for all.
        return ServeConfig(upstream=upstream, connections=1)

    with (
        transformers_serve(model, tmp_path) as upstream,
        running(
            create_app(pfm.wrap(None, flow, encoder=encoder), ServeConfig(upstream=upstream, connections=1))
        ) as url,
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(8) as pool,
    ):

        def ask(number: int) -> Any:
            return client.chat.completions.create(model=str(model), messages=MESSAGES, seed=100 * number)

        answers = list(pool.map(ask, range(24)))
        assert ask(5).choices[0].message.content == answers[5].choices[0].message.content
        stream: Any = client.chat.completions.create(model=str(model), messages=MESSAGES, stream=True)
        chunks = list(stream)
        through: Any = client.chat.completions.create(
            model=str(model), messages=MESSAGES, stream=True, extra_body={"pfm": False}
        )
        plain = "".join(chunk.choices[0].delta.content or "" for chunk in through)

    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed in chunks[-1].pfm["candidates"]
    assert re.search(r"\w", plain)
    for answer in answers:
        evidence = answer.pfm
        assert evidence["refined"]
        assert len(evidence["candidates"]) == 8
        assert len(set(evidence["candidates"])) > 4
        assert evidence["win_probability"]["chosen"] == max(evidence["probabilities"])
        # 8 calls, as this server ignores n; the first that shows it was one of the 8
        assert evidence["calls"] == 8
        assert answer.usage.prompt_tokens % 8 == 0
    # At equal budget: the pick against the mean of the same candidates.
    gains = [judge(a.choices[0].message.content) - statistics.mean(map(judge, a.pfm["candidates"])) for a in answers]
    assert statistics.mean(gains) > 2 * statistics.stdev(gains) / math.sqrt(len(gains))
    print(f"gain {statistics.mean(gains):.2f}, standard error {statistics.stdev(gains) / math.sqrt(len(gains)):.2f}")
    # The control picks among the same candidates; whatever it picks, it is not liked more.
    candidates = [answer.pfm["candidates"] for answer in answers]
    picked = pfm.wrap(None, control, encoder=encoder).refine(candidates, [ASK] * len(answers))
    chance = [judge(result.text) - statistics.mean(map(judge, result.candidates)) for result in picked]
    print(f"control {statistics.mean(chance):.2f}")
    assert statistics.mean(chance) < statistics.mean(gains) / 2
