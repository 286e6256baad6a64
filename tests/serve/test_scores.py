"""Scores as a service, in the shapes of vLLM, Cohere and Jina: over real sockets, with what strangers send.

The numbers are compared with those of the flow itself on the same vectors.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
from typing import Any

import httpx2
import openai
import pytest
import torch
from support.chat_server import ChatServer, reply, running
from support.proxy import fitted, metrics, post

import pfm
from pfm.preferences import BradleyTerry
from pfm.serve import ServeConfig, create_app

ENCODER = pfm.encoders.SurfaceEncoder()
PROMPT = "Question 1?"
TEXTS = [
    f"{PROMPT}: {text}"
    for text in ("river lamp wind!!!", "Garden bridge stone cloud.", "paper wind lol", "Garden bridge stone cloud.")
]


@pytest.fixture(scope="module")
def flow() -> pfm.PreferenceFlow:
    return fitted()


@pytest.fixture(scope="module")
def judged_by_model() -> pfm.PreferenceFlow:
    """Return a flow whose b is by a preference model, so that candidates are each other's opponents."""
    source = random.Random(1)
    rows = [
        {"prompt": f"Question {k // 2}?", "chosen": reply(True, source), "rejected": reply(False, source)}
        for k in range(80)
    ]
    encoded = pfm.PreferencePairs.from_rows(rows).encode(ENCODER, progress=False)
    return pfm.PreferenceFlow.fit(encoded, pfm.FlowConfig(residual=False), preference=BradleyTerry(), progress=False)


@contextlib.contextmanager
def scorer(flow: Any, encoder: Any = ENCODER, **settings: Any):
    refiner = pfm.wrap(None, flow, encoder=encoder)
    with running(create_app(refiner, ServeConfig(**settings))) as url:
        yield url


@pytest.fixture(scope="module")
def url(flow):
    with scorer(flow, score_model="my-flow") as url:
        yield url


def b_of(flow: pfm.PreferenceFlow, prompts: list[str], texts: list[str]) -> list[float]:
    return flow.win_probability(ENCODER.encode(texts), ENCODER.encode_prompts(prompts)).tolist()


def good(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = post(url, body, path)
    assert answer.status_code == 200, answer.text
    return answer.json()


# ------------------------------------------------------------------------------------------------------- the shapes


@pytest.mark.parametrize(
    ("prompts", "texts"),
    [(PROMPT, TEXTS[0]), (PROMPT, TEXTS), ([PROMPT], TEXTS), ([f"Question {k}?" for k in range(4)], TEXTS)],
)
def test_scores_are_b_in_the_order_given(url, flow, prompts, texts):
    answer = good(url, "/score", {"model": "my-flow", "text_1": prompts, "text_2": texts})
    texts = [texts] if isinstance(texts, str) else texts
    asked = [prompts] if isinstance(prompts, str) else prompts
    assert {name: answer[name] for name in ("object", "model")} == {"object": "list", "model": "my-flow"}
    assert [(row["index"], row["object"]) for row in answer["data"]] == [(k, "score") for k in range(len(texts))]
    wanted = b_of(flow, asked * (len(texts) if len(asked) == 1 else 1), texts)
    assert [row["score"] for row in answer["data"]] == pytest.approx(wanted, abs=1e-6)
    assert isinstance(answer["created"], int)
    assert answer["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    assert answer["pfm"]["against"] == "reference"


@pytest.mark.parametrize(
    ("first", "second"), [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")]
)
def test_the_later_names_of_the_fields_are_known_too(url, flow, first, second):
    answer = good(url, "/score", {first: PROMPT, second: TEXTS})
    assert [row["score"] for row in answer["data"]] == pytest.approx(b_of(flow, [PROMPT] * 4, TEXTS), abs=1e-6)


@pytest.mark.parametrize("path", ["/rerank", "{root}/rerank", "{root}/v2/rerank"])
@pytest.mark.parametrize("top_n", [None, 0, 1, 2, 99])
def test_a_ranking_is_by_falling_b_with_ties_in_the_order_given(url, flow, path, top_n):
    root = url.removesuffix("/v1")
    base, path = (root, path.removeprefix("{root}")) if path.startswith("{root}") else (url, path)
    body = {"model": "pfm", "query": PROMPT, "documents": TEXTS} | ({} if top_n is None else {"top_n": top_n})
    answer = good(base, path, body)
    b = b_of(flow, [PROMPT] * 4, TEXTS)
    order = sorted(range(4), key=lambda k: -round(b[k], 6))[: top_n or None]
    assert order[:2] == [1, 3][: len(order)]
    assert [row["index"] for row in answer["results"]] == order
    assert [row["relevance_score"] for row in answer["results"]] == pytest.approx([b[k] for k in order], abs=1e-6)
    assert [row["document"] for row in answer["results"]] == [{"text": TEXTS[k]} for k in order]
    assert answer["pfm"]["against"] == "reference"


def test_documents_may_be_objects_and_need_not_come_back(url):
    objects = [{"text": text, "id": k} for k, text in enumerate(TEXTS)]
    answer = good(url, "/rerank", {"query": PROMPT, "documents": objects, "return_documents": False})
    assert [row["index"] for row in answer["results"]] == [
        row["index"] for row in good(url, "/rerank", {"query": PROMPT, "documents": TEXTS})["results"]
    ]
    assert all(row.keys() == {"index", "relevance_score"} for row in answer["results"])


def test_a_conversation_is_classified_by_its_last_answer(url, flow):
    for place, label in ((0, "rejected"), (1, "preferred")):
        messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": TEXTS[place]}]
        (row,) = good(url.removesuffix("/v1"), "/classify", {"messages": messages})["data"]
        (b,) = b_of(flow, [PROMPT], [TEXTS[place]])
        assert (row["index"], row["label"], row["num_classes"]) == (0, label, 2)
        assert row["probs"] == pytest.approx([1 - b, b], abs=1e-6)


def test_texts_alone_are_classified_by_a_flow_that_reads_no_prompts():
    rejected = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    pairs = pfm.EncodedPairs(rejected + 2, rejected, group=torch.arange(200))
    flow = pfm.PreferenceFlow.fit(pairs, pfm.FlowConfig(residual=False), progress=False)

    class Length:
        def encode(self, texts, **_):
            return [[float(len(text)) / 10] for text in texts]

    with scorer(flow, Length()) as url:
        rows = good(url, "/classify", {"input": ["o", "o" * 40]})["data"]
        assert [row["label"] for row in rows] == ["rejected", "preferred"]
        assert good(url, "/score", {"text_1": "", "text_2": "o" * 40})["data"][0]["score"] == rows[1]["probs"][1]


def test_candidates_are_each_others_opponents_where_a_preference_model_gives_b(judged_by_model):
    with scorer(judged_by_model) as url:
        ranked = good(url, "/rerank", {"query": PROMPT, "documents": TEXTS})
        y, x = ENCODER.encode(TEXTS), ENCODER.encode_prompts([PROMPT]).expand(4, -1)
        among = judged_by_model.candidate_probabilities(y, x, torch.zeros(4))
        found = {row["index"]: row["relevance_score"] for row in ranked["results"]}
        assert [found[k] for k in range(4)] == pytest.approx(among.tolist(), abs=1e-6)
        assert ranked["pfm"]["against"] == "candidates"
        scores = [row["score"] for row in good(url, "/score", {"text_1": PROMPT, "text_2": TEXTS})["data"]]
        assert scores == pytest.approx(judged_by_model.win_probability(y, x).tolist(), abs=1e-6)
        assert scores != pytest.approx(among.tolist(), abs=1e-3)


def test_the_ranking_is_what_the_proxy_would_choose(flow, url):
    refiner = pfm.wrap(None, flow, encoder=ENCODER, margin=-1)
    (chosen,) = refiner.refine([TEXTS], [PROMPT])
    assert good(url, "/rerank", {"query": PROMPT, "documents": TEXTS})["results"][0]["index"] == chosen.index


# --------------------------------------------------------------------------------------------------- texts of all kinds


def test_a_text_without_an_answer_scores_0(url, flow):
    texts = ["", " \n", "<think>half a thought", f"<think>so</think>{TEXTS[1]}"]
    scores = [row["score"] for row in good(url, "/score", {"text_1": PROMPT, "text_2": texts})["data"]]
    assert scores[:3] == [0, 0, 0]
    assert scores[3] == pytest.approx(b_of(flow, [PROMPT], [TEXTS[1]])[0], abs=1e-6)
    results = good(url, "/rerank", {"query": PROMPT, "documents": [*texts, TEXTS[1]]})["results"]
    assert [row["index"] for row in results] == [3, 4, 0, 1, 2]
    assert [row["score"] for row in good(url, "/score", {"text_1": PROMPT, "text_2": ""})["data"]] == [0]


def test_thousands_of_documents_are_ranked(flow, url):
    texts = [f"Garden {k}{'!' * (k % 7)}" for k in range(3000)]
    results = good(url, "/rerank", {"query": PROMPT, "documents": texts, "top_n": 3, "return_documents": False})
    scores = [row["relevance_score"] for row in results["results"]]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(max(b_of(flow, [PROMPT] * 3000, texts)), abs=1e-5)


STRANGE = ["日本語の答え。", "👩‍👩‍👧 answer \u202e reversed", "\x00 nul", "a" * 32_000, "é" * 3, "{{ prompt }} {% x %}"]


def test_strange_texts_come_back_as_they_went(url):
    results = good(url, "/rerank", {"query": "¿Qué? 你好", "documents": STRANGE})["results"]
    assert {row["index"]: row["document"]["text"] for row in results} == dict(enumerate(STRANGE))
    assert all(0 <= row["relevance_score"] <= 1 for row in results)


NOT_TEXTS = [None, 5, True, 1.5, [], [5], [None], [[]], [["a"]], [{"content": "a"}], [{"text": 5}], {"a": "b"}]


@pytest.mark.parametrize("value", NOT_TEXTS)
@pytest.mark.parametrize("field", ["text_1", "text_2"])
def test_a_side_that_is_no_text_is_refused_by_name(url, field, value):
    answer = post(url, {"text_1": "Why?", "text_2": "So."} | {field: value}, "/score")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == field
    assert error["message"].startswith(field)
    assert error["code"] == "pfm_bad_request"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"documents": ["a"]}, "query"),
        ({"query": ["a"], "documents": ["a"]}, "query"),
        ({"query": " ", "documents": ["a"]}, "query"),
        ({"query": "a"}, "documents"),
        ({"query": "a", "documents": []}, "documents"),
        ({"query": "a", "documents": ["a"], "top_n": -1}, "top_n"),
        ({"query": "a", "documents": ["a"], "top_n": True}, "top_n"),
        ({"query": "a", "documents": ["a"], "top_n": "1"}, "top_n"),
        ({"query": "a", "documents": ["a"], "top_n": 0.5}, "top_n"),
        ({"query": "a", "documents": ["a"], "top_n": math.nan}, "top_n"),
        ({"query": "a", "documents": ["a"], "top_n": -math.inf}, "top_n"),
        ({"query": "a", "documents": ["a"], "return_documents": "yes"}, "return_documents"),
        ({"query": "a", "documents": ["a"], "model": 7}, "model"),
    ],
)
def test_a_ranking_that_is_not_understood_is_refused_by_name(url, body, param):
    answer = post(url, body, "/rerank")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": "a"},  # this flow reads prompts
        {"input": [1, 2, 3]},
        {"input": "a", "messages": []},
        {"messages": []},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image_url"}]}]},
        {"messages": "a"},
    ],
)
def test_what_cannot_be_classified_is_refused(url, body):
    answer = post(url, body, "/classify")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in ("input", "messages")


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"{", b'"a"', b"\xff\xfe\xfa", b"[" * 5000, b'{"text_1": "\xff"}', b"{'a': 1}"]
)
@pytest.mark.parametrize("path", ["/score", "/rerank", "/classify"])
def test_bodies_that_are_no_objects_are_refused(url, path, content):
    answer = post(url, content, path)
    assert answer.status_code == 400
    assert "JSON object" in answer.json()["error"]["message"]


def test_half_a_surrogate_pair_is_refused_by_place(url):
    for path, body in (
        ("/rerank", {"query": "a", "documents": ["fine", "ab\ud800"]}),
        ("/score", {"text_1": "a", "text_2": ["fine", "ab\ud800"]}),
    ):
        answer = post(url, body, path)
        assert answer.status_code == 400
        assert "[1] is no valid Unicode: half of a surrogate pair at character 2" in answer.json()["error"]["message"]
    assert post(url, {"query": "\udfff", "documents": ["a"]}, "/rerank").json()["error"]["param"] == "query"


@pytest.mark.parametrize(("prompts", "texts"), [(2, 3), (3, 2), (2, 1)])
def test_sides_of_unequal_length_are_refused(url, prompts, texts):
    answer = post(url, {"text_1": ["a"] * prompts, "text_2": ["b"] * texts}, "/score")
    assert answer.status_code == 400
    assert f"got {prompts} and {texts}" in answer.json()["error"]["message"]


# ---------------------------------------------------------------------------------- limits, auth, metrics, other models


def test_limits_name_themselves(flow):
    limits = {"scored_texts": 3, "text_characters": 50, "judged_characters": 100, "request_bytes": 1000}
    with scorer(flow, **limits) as url:
        for body, told in (
            ({"text_1": "a", "text_2": ["b"] * 4}, "holds 4 texts, and one request may have 3"),
            ({"text_1": "a", "text_2": "b" * 51}, "text_2 has 51 characters, and a text may have 50"),
            ({"text_1": "a" * 51, "text_2": "b"}, "text_1 has 51 characters"),
            ({"text_1": "a" * 10, "text_2": ["b" * 40] * 3}, "130 characters to encode"),
            ({"text_1": "a", "text_2": "b" * 2000}, "larger than 1000 bytes"),
        ):
            answer = post(url, body, "/score")
            assert answer.status_code == 413
            assert told in answer.json()["error"]["message"]
        assert post(url, {"text_1": "a", "text_2": ["b"] * 3}, "/score").status_code == 200


def test_a_token_is_asked_for_and_browsers_are_checked(flow, monkeypatch):
    monkeypatch.setenv("SCORES_TOKEN", "a-token-of-the-server")
    body = {"text_1": PROMPT, "text_2": TEXTS}
    with scorer(flow, token_env="SCORES_TOKEN") as url:
        for path in ("/score", "/rerank", "/classify"):
            assert post(url, body, path).status_code == 401
            assert post(url.removesuffix("/v1"), body, path).status_code == 401
        assert post(url, body, "/score", authorization="Bearer a-token-of-the-server").status_code == 200
        assert httpx2.get(url + "/models").status_code == 401
    with scorer(flow) as url:
        assert post(url, body, "/score", origin="https://evil.example").status_code == 403
        assert post(url, body, "/score", host="evil.example").status_code == 403


def test_requests_are_counted_by_kind_and_outcome(flow):
    with scorer(flow) as url:
        good(url, "/score", {"text_1": PROMPT, "text_2": TEXTS})
        good(url, "/rerank", {"query": PROMPT, "documents": TEXTS[:2]})
        post(url, {}, "/classify")
        found = metrics(url)
    assert found['pfm_requests_total{endpoint="score",outcome="scored"}'] == 1
    assert found['pfm_requests_total{endpoint="rerank",outcome="scored"}'] == 1
    assert found['pfm_requests_total{endpoint="classify",outcome="bad_request"}'] == 1
    assert found['pfm_scored_texts_total{endpoint="score"}'] == 4
    assert found['pfm_scored_texts_total{endpoint="rerank"}'] == 2
    assert found["pfm_requests_active"] == found["pfm_held_bytes"] == 0


class Broken:
    """Encodes some texts as NaN, and stops at others."""

    def __init__(self) -> None:
        self.dimension = ENCODER.dimension

    def encode(self, texts, **_):
        if any("stop" in text for text in texts):
            raise RuntimeError("secret text")
        return torch.stack([ENCODER.encode([t])[0] * (math.nan if "nan" in t else 1) for t in texts])

    def encode_prompts(self, texts, **_):
        return ENCODER.encode_prompts(texts)

    def describe(self):
        return ENCODER.describe()


def test_an_encoder_that_fails_is_an_error_without_the_texts(flow):
    with scorer(flow, Broken()) as url:
        answer = post(url, {"text_1": "a", "text_2": ["fine", "nan", "nan too"]}, "/score")
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "the encoder gave NaN or infinity for texts 1, 2"
        answer = post(url, {"text_1": "a", "text_2": ["stop"]}, "/score")
        assert (answer.status_code, "secret" in answer.text) == (500, False)
        assert post(url, {"text_1": "a", "text_2": ["fine"]}, "/score").status_code == 200


def test_without_an_upstream_there_is_a_model_and_no_chat(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["my-flow"]
        with pytest.raises(openai.NotFoundError, match="gives scores only"):
            client.chat.completions.create(model="my-flow", messages=[{"role": "user", "content": "Hi"}])
        answer = client.post("/score", body={"model": "my-flow", "text_1": "a", "text_2": "b"}, cast_to=dict[str, Any])
        assert len(answer["data"]) == 1
    answer = post(url, {"model": "gpt", "text_1": "a", "text_2": "b"}, "/score")
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")
    assert "my-flow or pfm" in answer.json()["error"]["message"]
    assert httpx2.get(url.removesuffix("/v1") + "/healthz").json()["status"] == "ok"
    assert post(url, {}, "/embeddings").status_code == 404
    wrong = httpx2.get(url.removesuffix("/v1") + "/score")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["message"] == "this path has POST only"


def test_scores_of_other_models_are_the_upstreams(flow):
    with running(ChatServer().app) as upstream, scorer(flow, upstream=upstream) as url:
        body = {"model": "bge-reranker", "query": "a", "documents": ["b"], "top_n": 1}
        answer = post(url, body, "/rerank")
        assert answer.headers["x-pfm-refined"] == "false"
        echo = answer.json()
        assert (echo["path"], json.loads(echo["body"])) == ("rerank", body)
        own = good(url, "/rerank", body | {"model": "pfm"})
        assert own["results"][0]["index"] == 0
        root = post(url.removesuffix("/v1"), body, "/rerank")
        assert root.status_code == 404
