"""The proxy: the openai client through it, over real sockets, against a real upstream that misbehaves on demand."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import uvicorn
from support.chat_server import ChatServer, running
from support.fault_server import FAULTS, FaultServer, mixed_faults
from support.proxy import KEY, MESSAGES, TroubledEncoder, ask, client, eventually, fitted, metrics, plain, post, proxy
from typer.testing import CliRunner

import pfm
from pfm.cli import app
from pfm.serve import ServeConfig, create_app, read_settings
from pfm.serve.answer import events
from pfm.serve.asked import Rule
from pfm.serve.judge import Judge


@pytest.fixture(scope="module")
def flow() -> pfm.PreferenceFlow:
    return fitted()


@pytest.fixture(scope="module")
def refiner(flow) -> pfm.Refiner:
    return pfm.wrap(None, flow, encoder=pfm.encoders.SurfaceEncoder(), n=8)


@pytest.fixture(scope="module")
def shared_server() -> ChatServer:
    return ChatServer()


@pytest.fixture(scope="module")
def upstream(shared_server):
    with running(shared_server.app) as url:
        yield url


@pytest.fixture
def server(shared_server) -> ChatServer:
    """Return the upstream, its memory empty."""
    shared_server.received.clear()
    shared_server.gone = 0
    return shared_server


@pytest.fixture(scope="module")
def shared_url(refiner, upstream):
    with proxy(refiner, upstream) as url:
        yield url


@pytest.fixture
def url(server, shared_url):
    return shared_url


@pytest.fixture
def fresh_url(server, refiner, upstream):
    """Return a proxy that nothing has been asked of yet."""
    with proxy(refiner, upstream) as url:
        yield url


# ------------------------------------------------------------------------------------------- the refined answer


def test_the_answer_is_the_best_candidate_in_the_upstreams_own_envelope(server, url, refiner):
    answer = ask(url, temperature=0.7, user="me")
    evidence = answer.pfm
    (own,) = refiner.refine([evidence["candidates"]], [MESSAGES])
    assert answer.choices[0].message.content == own.text
    assert evidence["win_probability"]["chosen"] == pytest.approx(max(own.probabilities))
    assert evidence["win_probability"]["original"] == pytest.approx(own.probabilities[0])
    assert evidence["changed"]
    assert own.changed
    assert evidence["margin"] == refiner.flow.guard_margin
    assert len(evidence["candidates"]) == evidence["n"] == 8
    assert evidence["index"] == own.index
    # the envelope
    assert (answer.id, answer.model, answer.created) == ("chatcmpl-1", "heeds-n-2026", 1_700_000_000)
    assert answer.of_this_server == {"kept": True}
    (choice,) = answer.choices
    assert (choice.index, choice.of_this_choice, choice.finish_reason) == (0, own.index, "stop")
    assert answer.usage.completion_tokens == 40
    # what the upstream saw
    ((headers, body),) = server.received
    assert body == {**plain(), "temperature": 0.7, "user": "me", "n": 8}
    assert headers["authorization"] == f"Bearer {KEY}"


def test_over_many_requests_b_rises_and_never_falls_and_swapped_labels_choose_the_others(url, flow, upstream):
    def good(text: str) -> bool:
        return text.endswith(".")

    answers = [ask(url, messages=[{"role": "user", "content": f"Question {k}?"}]) for k in range(20)]
    gains = [a.pfm["win_probability"]["chosen"] - a.pfm["win_probability"]["original"] for a in answers]
    assert min(gains) >= 0
    assert sum(good(a.choices[0].message.content) for a in answers) >= 18
    assert sum(good(a.pfm["candidates"][0]) for a in answers) == 0  # the upstream's first choice is a bad one

    class Swapped:
        metadata, guard_margin = flow.metadata, 0.0

        def win_probability(self, y, context=None):
            return 1 - flow.win_probability(y, context)

        def alignment(self, y, context=None):
            return flow.alignment(y, context)

    swapped = pfm.Refiner(None, Swapped(), pfm.encoders.SurfaceEncoder(), pfm.decoders.Select(), 8)
    with proxy(swapped, upstream) as turned:
        answers = [ask(turned, messages=[{"role": "user", "content": f"Question {k}?"}]) for k in range(10)]
    assert sum(good(a.choices[0].message.content) for a in answers) <= 1


def test_a_flow_of_shuffled_labels_changes_nothing_and_costs_nothing(server, upstream):
    controls = [fitted(shuffled=seed) for seed in range(3)]
    unsure = [control for control in controls if control.guard_margin == float("inf")]
    assert len(unsure) >= 2  # one in twenty is confirmed by chance
    control = unsure[0]
    with proxy(pfm.wrap(None, control, encoder=pfm.encoders.SurfaceEncoder()), upstream) as url:
        through = post(url, plain())
        assert through.headers["x-pfm-refined"] == "false"
        assert "infinite" in through.headers["x-pfm-reason"]
        assert "n" not in server.bodies[-1]
        assert through.json()["choices"][0]["message"]["content"].startswith("Question 1?: ")
        # asked for all the same, it changes what the request says
        assert ask(url, extra_body={"pfm": {"margin": 0}}).pfm["refined"]


def test_sixty_four_clients_at_once_each_get_an_answer_to_their_own_question(fresh_url):
    url = fresh_url

    async def one(number: int) -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key=f"{KEY}-{number}", max_retries=0) as asking:
            content = f"Question {number} of many?"
            messages: Any = [{"role": "user", "content": content}]
            answer: Any = await asking.chat.completions.create(
                model="one" if number % 4 == 0 else "heeds-n", messages=messages
            )
            assert answer.choices[0].message.content.startswith(f"{content}: ")
            assert all(text.startswith(f"{content}: ") for text in answer.pfm["candidates"])
            assert answer.pfm["refined"]
            assert len(answer.pfm["candidates"]) == 8

    async def all_of_them() -> None:
        await asyncio.gather(*(one(number) for number in range(64)))

    asyncio.run(all_of_them())
    counted = metrics(url)
    assert counted["pfm_request_seconds_count"] == 64
    assert counted["pfm_requests_active"] == counted["pfm_requests_waiting"] == 0
    assert counted["pfm_batch_requests_sum"] > 0
    assert counted["pfm_encoder_seconds_count"] == 64


@pytest.mark.parametrize("include_usage", [False, True])
def test_streaming_gives_the_refined_answer_piece_by_piece(server, url, refiner, include_usage):
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if include_usage else {}
    chunks = ask(url, stream=True, **options)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    (evidence,) = [chunk.pfm for chunk in chunks if hasattr(chunk, "pfm")]
    assert sum(map(bool, pieces)) > 1
    (own,) = refiner.refine([evidence["candidates"]], [MESSAGES])
    assert "".join(pieces) == own.text
    assert own.changed
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices] == [None] * (len(pieces) - 1) + [
        "stop"
    ]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {(chunk.id, chunk.model) for chunk in chunks} == {("chatcmpl-1", "heeds-n-2026")}
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [40] * include_usage
    assert not {"stream", "stream_options"} & server.bodies[0].keys()


def test_the_async_client_streams_and_its_stream_helper_works(url):
    async def streamed() -> Any:
        async with (
            openai.AsyncOpenAI(base_url=url, api_key=KEY) as asking,
            asking.chat.completions.stream(model="one", messages=MESSAGES) as stream,
        ):
            async for _ in stream:
                pass
            return await stream.get_final_completion()

    final = asyncio.run(streamed())
    assert final.choices[0].message.content.startswith("Question 1?: ")


@pytest.mark.parametrize(
    "text", ["", " ", "one", "two words", " a\n\n b\tc  ", "x" * 5000, "ein — “zwei”\u2028drei 🙂 " * 9]
)
def test_the_pieces_of_a_stream_are_the_text(text):
    whole = {"id": "1", "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
    *found, end = events(whole, {}, include_usage=False)
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in found]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
    assert end == b"data: [DONE]\n\n"


# --------------------------------------------------------------------------------------------- where n is not heeded


def test_where_n_is_ignored_the_rest_is_drawn_in_parallel_and_learned(server, fresh_url):
    url = fresh_url
    answer = ask(url, "one", seed=5)
    assert answer.pfm["calls"] == 8
    assert len(set(answer.pfm["candidates"])) == 8
    assert answer.usage.prompt_tokens == 80
    assert answer.usage.completion_tokens == 40
    assert answer.usage.completion_tokens_details.reasoning_tokens == 8
    assert sorted(body["seed"] for body in server.bodies) == [5, 6, 7, 8, 9, 10, 11, 12]
    assert [body.get("n") for body in server.bodies] == [8] + [None] * 7
    assert ask(url, "one").pfm["calls"] == 8
    assert all("n" not in body for body in server.bodies[8:])
    ask(url, "heeds-n")
    assert server.bodies[-1]["n"] == 8  # what was learned is of that model alone


def test_where_n_is_refused_it_is_left_out(server, fresh_url):
    url = fresh_url
    answer = ask(url, "refuses-n")
    assert answer.pfm["calls"] == 9
    assert len(answer.pfm["candidates"]) == 8
    assert ask(url, "refuses-n").pfm["calls"] == 8


def test_candidates_that_fail_do_not_harm_those_that_come(url):
    answer = ask(url, "flaky", extra_body={"pfm": {"n": 4}})
    assert answer.pfm["refined"]
    assert 1 < len(answer.pfm["candidates"]) < 4
    assert answer.pfm["errors"] == {"the upstream answered with status 500": 4 - len(answer.pfm["candidates"])}
    assert answer.usage.prompt_tokens == 10 * len(answer.pfm["candidates"])


# ------------------------------------------------------------------------------------------ what a request chooses


@pytest.mark.parametrize(
    ("extra", "n", "by"),
    [({"n": 3}, 3, "win_probability"), ({"strength": 4}, 8, "sample"), ({"by": "combined", "n": 2}, 2, "combined")],
)
def test_a_request_chooses_n_and_rule_in_its_body_or_its_headers(server, url, extra, n, by):
    for answer in (
        ask(url, extra_body={"pfm": extra}),
        ask(url, extra_headers={f"x-pfm-{name}": str(value) for name, value in extra.items()}),
    ):
        assert (answer.pfm["n"], len(answer.pfm["candidates"]), answer.pfm["by"]) == (n, n, by)
    for headers, body in server.received:
        assert "pfm" not in body
        assert not [name for name in headers if name.startswith("x-pfm-") and name != "x-pfm-instance"]


def test_a_margin_keeps_the_original_and_one_candidate_is_only_judged(server, url):
    kept = ask(url, extra_body={"pfm": {"margin": 0.9}})
    assert kept.choices[0].message.content == kept.pfm["candidates"][0]
    assert not kept.pfm["changed"]
    assert "below the guard margin" in kept.pfm["reason"]
    judged = ask(url, extra_body={"pfm": {"n": 1}})
    assert 0 < judged.pfm["win_probability"]["original"] < 1
    assert "n" not in server.bodies[-1]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"n": 0}, "pfm.n must be an integer from 1 to 32, got 0"),
        ({"n": 33}, "pfm.n must be an integer"),
        ({"n": True}, "pfm.n must be an integer"),
        ({"by": "luck"}, "pfm.by must be one of win_probability"),
        ({"strength": -1}, "pfm.strength must be"),
        ({"strength": 2, "by": "combined"}, "pfm.strength has no effect with by=combined"),
        ({"margin": "much"}, "pfm.margin must be a number"),
        ({"power": 2}, "pfm.power is unknown; known are refine, n, max, spend, by, margin, strength"),
        ("no", "pfm must be an object or a boolean"),
    ],
)
def test_an_extension_that_makes_no_sense_is_told_so(server, url, extra, message):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(url, extra_body={"pfm": extra})
    assert message in caught.value.message
    assert str(caught.value.param).startswith("pfm")
    assert not server.received


def test_headers_that_make_no_sense_are_told_so(url):
    assert "pfm.n must be a number, got 'many'" in post(url, plain(), x_pfm_n="many").text
    assert "pfm.refine must be true or false" in post(url, plain(), x_pfm_refine="perhaps").text


# --------------------------------------------------------------------------------------------------- passing through

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
PICTURE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"n": 2}, "the request has n"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temperature": 0}, "temperature 0"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"messages": PICTURE}, "a message is not text"),
        ({"messages": [{"role": "user", "content": " "}]}, "the prompt is empty"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "not valid text"),
        ({"pfm": False}, "asks for it"),
        ({"pfm": {"refine": False}}, "asks for it"),
        ({"stream": True, "pfm": False}, "asks for it"),
    ],
)
def test_what_cannot_be_refined_is_passed_through_as_it_is(server, upstream, url, more, reason):
    through = post(url, plain(**more))
    server_saw = server.bodies.pop()
    server.received.clear()
    own = {name: value for name, value in plain(**more).items() if name != "pfm"}
    direct = post(upstream, own)
    assert through.content == direct.content
    assert server_saw == own
    assert through.headers["x-pfm-refined"] == "false"
    assert reason in through.headers["x-pfm-reason"]
    assert {**through.headers, "date": ""}.items() >= {**direct.headers, "date": "", "server": None}.items() - {
        ("server", None)
    }


def test_opting_out_by_header_leaves_the_bytes_of_the_body_alone(server, url):
    content = b'{"model" : "heeds-n", "messages":[{"role":"user","content":"Question 1?"}] }'
    assert post(url, content, x_pfm_refine="false").headers["x-pfm-refined"] == "false"
    headers, _ = server.received[-1]
    assert headers["content-length"] == str(len(content))
    assert [name for name in headers if name.startswith("x-pfm-")] == ["x-pfm-instance"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"text"', b"[" * 100_000, b"\xff\xfe"])
def test_a_body_that_is_no_request_is_the_upstreams_to_refuse(upstream, url, content):
    # this upstream does not check, and fails
    assert post(url, content).status_code == post(upstream, content).status_code == 500


@pytest.mark.parametrize(("model", "reason"), [("calls", "tool_calls"), ("blank", "no text")])
@pytest.mark.parametrize("stream", [False, True])
def test_an_original_that_is_no_text_is_passed_on_with_what_it_holds(url, model, reason, stream):
    answer = ask(url, model, stream=stream)
    if stream:
        message, evidence = answer[0].choices[0].delta, answer[-1].pfm
    else:
        message, evidence = answer.choices[0].message, answer.pfm
    assert not evidence["refined"]
    assert reason in evidence["reason"]
    if model == "calls":
        assert message.tool_calls[0].function.name == "add"


def test_conversations_and_text_parts_are_refined(url):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Question"}, {"type": "text", "text": "1?"}]},
    ]
    assert ask(url, messages=messages).pfm["refined"]


def test_other_endpoints_are_passed_through(url, upstream):
    with client(url) as asking:
        assert [model.id for model in asking.models.list()] == ["heeds-n"]
    with httpx2.Client() as asking:
        for method, path, content in (
            ("POST", "/embeddings?a=1&b=%20", b'{"input": "x"}'),
            ("DELETE", "/files/a%2Fb", None),
            ("GET", "/missing", None),
            ("POST", "/audio/transcriptions", b"\x00form"),
        ):
            found = asking.request(method, url + path, content=content, headers={"authorization": "Bearer k"})
            direct = asking.request(method, upstream + path, content=content, headers={"authorization": "Bearer k"})
            assert found.status_code == direct.status_code
            saw, would_see = found.json(), direct.json()
            assert saw.pop("headers").items() >= {"authorization": "Bearer k"}.items()
            would_see.pop("headers")
            assert saw == would_see
        binary = asking.get(url + "/binary")
        assert binary.content == bytes(range(256))
        assert binary.headers["x-pfm-refined"] == "false"


def test_paths_do_not_leave_the_upstreams_base_url(url, upstream):
    port = int(url.split(":")[2].split("/")[0])
    for path in ("/v1/../secret", "/v1/%2e%2e/secret", "/v1/a/..%2f..%2fsecret", "/v1/..%5csecret"):
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            status = raw.makefile("rb").readline()
        assert b" 400 " in status or b" 404 " in status, path
    assert "there is /v1/..." in post(url.removesuffix("/v1"), plain()).text


# ---------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "model", ["status-400", "status-401", "status-429", "status-500", "status-503", "html", "empty"]
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_upstream_are_passed_on_with_status_and_body(url, upstream, model, stream):
    through, direct = post(url, plain(model=model, stream=stream)), post(upstream, plain(model=model))
    assert through.status_code == direct.status_code
    assert through.content == direct.content
    for name in ("retry-after", "content-type"):
        assert through.headers.get(name) == direct.headers.get(name)


def test_the_openai_client_sees_the_upstreams_own_error(url):
    with pytest.raises(openai.RateLimitError, match=r"no luck \(429\)") as caught:
        ask(url, "status-429")
    assert caught.value.response.headers["retry-after"] == "7"


def test_an_upstream_that_is_not_there_is_a_502_that_says_so(refiner):
    with (
        proxy(refiner, "http://127.0.0.1:9/v1") as url,
        pytest.raises(openai.InternalServerError, match="the upstream cannot be reached") as caught,
    ):
        ask(url)
    assert caught.value.status_code == 502
    assert KEY not in caught.value.message


def test_an_upstream_that_breaks_off_is_a_502(refiner):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def break_off() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    connection.recv(100_000)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")
                    connection.close()

        threading.Thread(target=break_off, daemon=True).start()
        with proxy(refiner, f"http://127.0.0.1:{listening.getsockname()[1]}/v1") as url:
            answer = post(url, plain())
        assert answer.status_code == 502
        assert "broke off" in answer.json()["error"]["message"]
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("then", ["closes", "hangs"])
def test_a_stream_that_is_passed_through_breaks_off_where_the_upstreams_does(refiner, then):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        held = []

        def begin() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    connection.recv(100_000)
                    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                    connection.sendall(head + b"a\r\ndata: {}\n\n\r\n")
                    held.append(connection) if then == "hangs" else connection.close()

        threading.Thread(target=begin, daemon=True).start()
        with proxy(refiner, f"http://127.0.0.1:{listening.getsockname()[1]}/v1", timeout=0.4) as url:
            pieces = []
            with (
                pytest.raises(httpx2.RemoteProtocolError),  # no end that could be taken for the answer's
                httpx2.stream("POST", url + "/chat/completions", json=plain(stream=True, pfm=False)) as answer,
            ):
                pieces += answer.iter_bytes()
            assert answer.status_code == 200
            eventually(lambda: metrics(url)["pfm_requests_active"] == 0)
        listening.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


def test_an_upstream_that_hangs_is_a_504_and_one_that_hangs_later_costs_only_candidates(refiner, upstream, server):
    with proxy(refiner, upstream, timeout=0.5) as url:
        answer = post(url, plain(model="hangs"))
        assert (answer.status_code, answer.json()["error"]["type"]) == (504, "timeout")
        assert post(url, plain(model="hangs", pfm=False)).status_code == 504
        server.received.clear()
        late = ask(url, "hangs-later", extra_body={"pfm": {"n": 3}})
    assert late.choices[0].message.content.startswith("Question 1?: ")


def test_a_client_that_leaves_stops_the_work_and_frees_its_place(server, upstream, refiner):
    with proxy(refiner, upstream, concurrency=1) as url:
        for extra in ({}, {"pfm": False}):
            with pytest.raises(openai.APITimeoutError), client(url, timeout=0.3) as asking:
                asking.chat.completions.create(model="hangs", messages=MESSAGES, extra_body=extra)
        eventually(lambda: server.gone == 2)
        assert ask(url).pfm["refined"]
        counted = metrics(url)
        assert counted['pfm_requests_total{endpoint="chat",outcome="cancelled"}'] == 2
        assert counted["pfm_requests_active"] == 0


def test_beyond_the_queue_clients_are_told_to_come_again_and_those_that_do_are_served(refiner, upstream):
    with proxy(refiner, upstream, concurrency=1, queue=1) as url, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: post(url, plain(model="slow")), range(6)))
        assert sorted({answer.status_code for answer in answers}) == [200, 429]
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "pfm_busy"

        def patient(_: int) -> Any:
            with openai.OpenAI(base_url=url, api_key=KEY, max_retries=8) as asking:
                return asking.chat.completions.create(model="slow", messages=MESSAGES)

        assert all(answer.pfm["refined"] for answer in pool.map(patient, range(4)))
        assert httpx2.get(url.removesuffix("/v1") + "/healthz").json() == {"status": "ok", "active": 0, "waiting": 0}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_each_fault_of_an_upstream_is_an_answer_or_an_error_of_its_own(refiner, fault):
    timeout = 0.5 if fault in ("hang", "trickle") else 60.0
    with (
        FaultServer({fault: 1.0}, huge_bytes=3_000_000) as faulty,
        proxy(refiner, faulty.url, timeout=timeout) as url,
    ):
        answer = post(url, plain(model="tiny"))
        assert metrics(url)["pfm_requests_active"] == 0
    expected = {"429": 429, "500": 500, "refused_content": 400, "hang": 504, "trickle": 504, "reset": 502, "cut": 502}
    assert answer.status_code == expected.get(fault, 200)
    if fault == "429":
        assert answer.headers["retry-after"] == "1"
    if fault == "huge":
        assert answer.json()["pfm"]["refined"]
    else:
        assert answer.headers["x-pfm-refined"] == "false"


def test_under_mixed_faults_every_client_has_an_answer_or_an_error_and_nothing_is_left_behind(refiner):
    with (
        # a call that hangs ends before the proxy's deadline, which a slow machine must not reach
        FaultServer(mixed_faults(0.3), seed=2, n="ignore", hang=0.5, huge_bytes=2_000_000) as faulty,
        proxy(refiner, faulty.url, timeout=60) as url,
        ThreadPoolExecutor(16) as pool,
    ):

        def one(number: int) -> Any:
            try:
                return ask(url, "tiny", messages=[{"role": "user", "content": f"Question {number}?"}])
            except openai.APIStatusError as error:
                return error.status_code
            except (openai.APIError, AttributeError, TypeError, ValueError, IndexError):  # of a body that is no answer
                return 200

        answers = list(pool.map(one, range(40)))
        counted = metrics(url)
    refined = [answer for answer in answers if not isinstance(answer, int | str) and hasattr(answer, "pfm")]
    assert len(refined) >= 25  # one good call of eight is enough
    assert all(answer.choices[0].message.content in answer.pfm["candidates"] for answer in refined)
    assert any(answer.pfm["errors"] for answer in refined)
    assert counted["pfm_request_seconds_count"] == 40
    assert counted["pfm_requests_active"] == counted["pfm_requests_waiting"] == 0


def test_where_judging_fails_the_original_is_the_answer_and_others_are_judged(flow, upstream):
    refiner = pfm.Refiner(None, flow, TroubledEncoder(0.01), pfm.decoders.Select(), 4)
    with proxy(refiner, upstream) as url, ThreadPoolExecutor(8) as pool:
        asked = [f"Question {k}, {'trouble' if k % 4 == 0 else 'fine'}?" for k in range(16)]
        answers = list(pool.map(lambda text: ask(url, messages=[{"role": "user", "content": text}]), asked))
    for text, answer in zip(asked, answers, strict=True):
        assert answer.choices[0].message.content.startswith(text)
        assert answer.pfm["refined"] == ("fine" in text)
        if "trouble" in text:
            assert answer.pfm["reason"] == "the candidates could not be judged (EncodingError)"
            assert answer.choices[0].of_this_choice == 0


@pytest.mark.parametrize("trouble", [False, True])
def test_what_arrives_while_a_batch_is_judged_makes_up_the_next_one(flow, trouble):
    encoder = TroubledEncoder()
    judge = Judge(pfm.Refiner(None, flow, encoder, pfm.decoders.Select(), 4))
    texts = [[f"Question {k}?: stone river.", f"Question {k}?: wind lol"] for k in range(6)]
    prompts = [[{"role": "user", "content": f"Question {k}{', trouble' * (trouble and k == 3)}?"}] for k in range(6)]
    rule = Rule("win_probability", None, 1.0, 0)

    async def all_of_them() -> list[Any]:
        encoder.gate.clear()
        asking = [asyncio.create_task(judge.refine(texts[0], prompts[0], rule))]
        while not encoder.batches:
            await asyncio.sleep(0.001)
        asking += [asyncio.create_task(judge.refine(texts[k], prompts[k], rule)) for k in range(1, 6)]
        await asyncio.sleep(0.01)
        asking[5].cancel()  # its client has gone
        await asyncio.sleep(0)
        encoder.gate.set()
        return await asyncio.gather(*asking, return_exceptions=True)

    results = asyncio.run(all_of_them())
    judge.close()
    assert isinstance(results[5], asyncio.CancelledError)
    assert not any(text.startswith("Question 5") for batch in encoder.batches for text in batch)
    own = pfm.wrap(None, flow, encoder=pfm.encoders.SurfaceEncoder()).refine(texts, prompts)
    for k, result in enumerate(results[:5]):
        if trouble and k == 3:
            assert isinstance(result, pfm.EncodingError)
        else:
            assert result.refinement.text == own[k].text
            assert result.refinement.probabilities == pytest.approx(own[k].probabilities, abs=1e-5)
            assert result.batch == (1 if k == 0 or trouble else 4)


def test_where_judging_takes_too_long_the_original_is_the_answer(flow, upstream):
    refiner = pfm.Refiner(None, flow, TroubledEncoder(1), pfm.decoders.Select(), 4)
    with proxy(refiner, upstream, judge_timeout=0.2) as url:
        answer = ask(url)
    assert not answer.pfm["refined"]
    assert "more than 0.2 seconds" in answer.pfm["reason"]


def test_prompts_are_encoded_once(flow, upstream):
    encoder = TroubledEncoder()
    with proxy(pfm.Refiner(None, flow, encoder, pfm.decoders.Select(), 4), upstream) as url:
        for text in ("one?", "two?", "one?", "one?"):
            assert ask(url, messages=[{"role": "user", "content": text}]).pfm["refined"]
    assert encoder.prompts == ["one?", "two?"]


# ------------------------------------------------------------------------------------------------------ keys and doors


def test_with_a_token_only_its_bearers_come_in_and_the_upstream_gets_the_servers_key(
    server, upstream, refiner, monkeypatch
):
    monkeypatch.setenv("PROXY_TOKEN", "token-of-the-proxy")
    monkeypatch.setenv("UPSTREAM_KEY", "sk-of-the-server")
    with proxy(refiner, upstream, token_env="PROXY_TOKEN", upstream_key_env="UPSTREAM_KEY") as url:
        for wrong in ("x", "token-of-the-prox", "token-of-the-proxy2", KEY):
            for path in ("/chat/completions", "/embeddings"):
                answer = post(url, plain(), path, authorization=f"Bearer {wrong}")
                assert answer.status_code == 401, wrong
                assert "token-of-the-proxy" not in answer.text
        assert httpx2.get(url.removesuffix("/v1") + "/metrics").status_code == 401
        assert httpx2.get(url.removesuffix("/v1") + "/healthz").status_code == 200
        assert not server.received
        with client(url, "token-of-the-proxy") as asking:
            answer: Any = asking.chat.completions.create(model="one", messages=MESSAGES)
            assert answer.pfm["refined"]
            assert len(asking.models.list().data) == 1
        assert {headers["authorization"] for headers, _ in server.received} == {"Bearer sk-of-the-server"}


def test_a_token_alone_never_travels_to_the_upstream(server, upstream, refiner, monkeypatch):
    monkeypatch.setenv("PROXY_TOKEN", "token-of-the-proxy")
    with proxy(refiner, upstream, token_env="PROXY_TOKEN") as url:
        assert post(url, plain(), authorization="Bearer token-of-the-proxy").status_code == 200
        assert post(url, plain(pfm=False), authorization="Bearer token-of-the-proxy").status_code == 200
    assert len(server.received) == 2
    assert all("authorization" not in headers for headers, _ in server.received)


def test_no_key_in_logs_errors_metrics_or_objects(refiner, upstream, caplog, capfd, monkeypatch):
    monkeypatch.setenv("UPSTREAM_KEY", "sk-of-the-server")
    caplog.set_level(logging.DEBUG)
    seen = io.StringIO()
    for address in (upstream, "http://127.0.0.1:9/v1"):
        config = ServeConfig(upstream=address, timeout=0.3, upstream_key_env="UPSTREAM_KEY")
        made = create_app(refiner, config)
        with running(made) as url:
            for model in ("heeds-n", "hangs", "status-401", "html"):
                seen.write(post(url, plain(model=model), authorization=f"Bearer {KEY}").text)
                seen.write(post(url, plain(model=model, pfm={"n": 0}), authorization=f"Bearer {KEY}").text)
            seen.write(post(url, b"{}", f"/embeddings?key={KEY}-2").text.replace(f"key={KEY}-2", ""))  # it echoes
            seen.write(httpx2.get(url.removesuffix("/v1") + "/metrics").text)
        seen.write(repr(config) + repr(made) + repr(vars(made)))
    # httpx2's own client in this test logs its addresses; the proxy's lines must not
    proxys = [record for record in caplog.records if record.name.startswith(("pfm", "uvicorn"))]
    assert len([record for record in proxys if record.name == "pfm.serve.app"]) > 15
    seen.write("".join(f"{record.getMessage()}{record.exc_text}" for record in proxys))
    out, err = capfd.readouterr()
    echoed = seen.getvalue().replace('"authorization":"Bearer sk-of-the-server"', "")  # the upstream's own echo
    for text in (echoed, out, err):
        assert KEY not in text
        assert "sk-of-the-server" not in text


def test_cookies_of_the_upstream_do_not_travel_to_the_next_client(server, url):
    for _ in range(3):
        assert "set-cookie" in post(url, plain()).headers
    assert all("cookie" not in headers for headers, _ in server.received)


def test_pages_of_other_sites_and_the_proxy_itself_are_kept_out(refiner, server, url, upstream):
    assert post(url, plain(), origin="https://evil.example").status_code == 403
    assert post(url, plain(), origin="http://localhost:3000").status_code == 200
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = create_app(refiner, ServeConfig(upstream=f"http://127.0.0.1:{port}/v1", timeout=5))
    loop = uvicorn.Server(uvicorn.Config(made, port=port, log_config=None))
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    eventually(lambda: loop.started)
    answer = post(f"http://127.0.0.1:{port}/v1", plain())
    loop.should_exit = True
    thread.join(10)
    assert answer.status_code == 508
    assert "the proxy itself" in answer.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"upstream": "localhost:8000"}, "must be a URL with http or https"),
        ({"upstream": "http://u:p@host/v1"}, "no user or password"),
        ({"upstream": "http://host/v1/chat/completions"}, "without /chat/completions: http://host/v1"),
        ({"upstream": "http://host/v1?x=1"}, "base URL"),
        ({"upstream": "http://host:port/v1"}, "must be a URL"),
        ({"concurrency": 0}, "concurrency must be a whole number of at least 1: got 0"),
        ({"timeout": float("nan")}, "timeout must be a positive number"),
        ({"port": 70000}, "port must be a whole number from 0 to 65535: got 70000"),
        ({"queue": "3"}, "queue must be a whole number of at least 0: got '3'"),
        ({"host": "0.0.0.0", "upstream_key_env": "K"}, "whoever reaches it could use the upstream's key"),
    ],
)
def test_settings_that_make_no_sense_are_told_so(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ServeConfig(**{"upstream": "http://host/v1", **settings})


def test_settings_of_another_type_are_told_so():
    with pytest.raises(TypeError, match="upstream must be a URL, got int"):
        ServeConfig(upstream=5)  # pyright: ignore[reportArgumentType]


def test_a_missing_variable_is_named(refiner, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ValueError, match="token_env names the environment variable NOT_SET, which is not set"):
        create_app(refiner, ServeConfig(upstream="http://host/v1", token_env="NOT_SET"))


# ------------------------------------------------------------------------------------------------- on the command line


@pytest.fixture(scope="module")
def folder(flow, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flow")
    flow.save_pretrained(folder)
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from pfm.cli import main; main()", "serve", *map(str, arguments)]


@contextlib.contextmanager
def served(*arguments: object):
    """Run the command, and give its process and its base URL."""
    process = subprocess.Popen(
        command(*arguments, "--port", 0),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"on (http://127\.0\.0\.1:\d+/v1)", line)
        assert found, line + process.communicate(timeout=60)[1]
        url = found[1]
        eventually(lambda: _answers(url))
        yield process, url
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx2.RequestError):
        return httpx2.get(url.removesuffix("/v1") + "/healthz").status_code == 200
    return False


def test_the_command_serves_and_a_signal_lets_what_is_under_way_end(server, folder, upstream, tmp_path):
    settings = tmp_path / "serve.toml"
    settings.write_text(f'upstream = "{upstream}"\nn = 3\nqueue = 7\n')
    with served(folder, "--config", settings, "--model-name", "slow", "-n", 2) as (process, url):
        with ThreadPoolExecutor(1) as pool:
            answering = pool.submit(ask, url, "whatever")
            eventually(lambda: server.received)  # by the upstream: now it is under way
            process.send_signal(signal.SIGTERM)
            answer = answering.result()
        assert answer.pfm["refined"]
        assert answer.pfm["n"] == 2  # options go before the file
        assert answer.model == "slow-2026"
        assert process.wait(60) == 0
        assert process.stderr is not None
        told = process.stderr.read()
    assert "Traceback" not in told
    assert re.search(r"POST chat: 200 (changed|kept), b \d\.\d\d -> \d\.\d\d, \d+ ms \(upstream \d+, ", told)
    assert KEY not in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-flow", "--upstream", "http://localhost:1/v1"], "no-such-flow is no folder: make one with pfm fit"),
        (["{flow}", "--model-name", "gpt"], "model has no effect without upstream"),
        (["{flow}", "--upstream", "localhost:8000/v1"], "must be a URL with http or https"),
        (["{flow}", "--upstream", "http://localhost:1/v1", "--by", "luck"], "by must be one of"),
        (["{flow}", "--upstream", "http://localhost:1/v1", "-n", "0"], "n must be a whole number of at least 1"),
        (["{flow}", "--upstream", "http://localhost:1/v1", "--token-env", "NOT_SET"], "NOT_SET, which is not set"),
        (["{flow}", "--upstream", "http://localhost:1/v1", "--config", "{flow}/config.json"], "unknown settings"),
        (["{flow}", "--upstream", "http://localhost:1/v1", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
    ],
)
def test_mistakes_are_a_line_and_exit_code_2(folder, arguments, message):
    result = CliRunner().invoke(app, ["serve", *(text.format(flow=folder) for text in arguments)])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_a_port_that_is_taken_is_named(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", str(folder), "--upstream", "http://localhost:1/v1", "--port", port])
    assert result.exit_code == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in result.stderr
    assert "choose another by --port N, or a free one by --port 0" in " ".join(result.stderr.split())


def test_an_upstream_that_looks_wrong_is_noted_at_the_start(refiner, upstream, caplog):
    with proxy(refiner, "http://127.0.0.1:9/v1"), proxy(refiner, upstream.removesuffix("/v1")):
        pass
    first, second = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert first.startswith("the upstream cannot be reached")
    assert second.endswith(f"did you mean {upstream}?")


def test_without_the_extra_it_says_what_to_install(folder):
    code = "import sys; sys.modules['fastapi'] = None; from pfm.cli import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", code, "serve", str(folder), "--upstream", "http://localhost:1/v1"],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2
    assert 'pip install "preference-flow[serve]"' in found.stderr


def test_settings_are_read_from_toml_and_json(tmp_path):
    (tmp_path / "a.toml").write_text('upstream = "http://host/v1"\nn = 4')
    (tmp_path / "b.json").write_text('{"upstream": "http://host/v1", "n": 4}')
    assert read_settings(tmp_path / "a.toml") == read_settings(tmp_path / "b.json")
    (tmp_path / "c.toml").write_text("not toml")
    with pytest.raises(ValueError, match=r"c\.toml.*expected settings as TOML"):
        read_settings(tmp_path / "c.toml")
