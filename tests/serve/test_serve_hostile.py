"""The proxy in hostile hands: clients and upstreams that mean harm, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest
import uvicorn
from support.chat_server import ChatServer, running
from support.fault_server import FaultServer
from support.proxy import KEY, MESSAGES, TroubledEncoder, ask, client, eventually, fitted, metrics, plain, post, proxy

import pfm
from pfm.serve import ServeConfig, create_app
from pfm.serve.answer import events, to_json
from pfm.serve.asked import Rule
from pfm.serve.drawn import summed
from pfm.serve.errors import Refused
from pfm.serve.http import LoopErrors, streamed_response
from pfm.serve.judge import SLICE_CHARACTERS, Judge
from pfm.serve.places import Memory
from pfm.serve.redaction import Redactor
from pfm.serve.server import listen_on, server_settings


@pytest.fixture(scope="module")
def flow() -> pfm.PreferenceFlow:
    return fitted()


@pytest.fixture(scope="module")
def refiner(flow) -> pfm.Refiner:
    return pfm.wrap(None, flow, encoder=pfm.encoders.SurfaceEncoder(), n=3)


@pytest.fixture(scope="module")
def chat() -> ChatServer:
    return ChatServer()


@pytest.fixture(scope="module")
def upstream(chat):
    with running(chat.app) as url:
        yield url


@pytest.fixture(scope="module")
def url(refiner, upstream):
    with proxy(refiner, upstream) as url:
        yield url


@contextlib.contextmanager
def faulty(refiner: pfm.Refiner, fault: str, options: dict[str, Any] | None = None, **settings: Any):
    with FaultServer({fault: 1.0}, **(options or {})) as server, proxy(refiner, server.url, **settings) as url:
        yield server, url


@contextlib.contextmanager
def limited(refiner: pfm.Refiner, upstream: str, **settings: Any) -> Iterator[tuple[str, uvicorn.Server]]:
    """Serve as ``pfm serve`` does, with limits on connections; give the base URL and the server."""
    config = ServeConfig(upstream=upstream, port=0, **settings)
    server = uvicorn.Server(server_settings(create_app(refiner, config), config))
    listening = listen_on(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    eventually(lambda: server.started, 60)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1", server
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()


@contextlib.contextmanager
def raw_server(answer: Callable[[socket.socket], object]) -> Iterator[str]:
    """Accept connections and hand each to a function, in a thread of its own; give the base URL."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def handle(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                if connection.recv(100, socket.MSG_PEEK).startswith(b"GET /v1/models"):  # at the proxy's start
                    connection.recv(100_000)
                    connection.sendall(b"HTTP/1.1 404 None\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                else:
                    answer(connection)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=handle, args=(listening.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        listening.shutdown(socket.SHUT_RDWR)


def connect(url: str) -> socket.socket:
    host, port = url.split("/")[2].split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def head(path: str = "/v1/chat/completions", **headers: Any) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: localhost", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def health(url: str) -> dict[str, Any]:
    return httpx2.get(url.removesuffix("/v1") + "/healthz", timeout=60).json()


def is_free(url: str) -> bool:
    return health(url) == {"status": "ok", "active": 0, "waiting": 0}


# ----------------------------------------------------------------------------------------------------------- headers


def test_headers_of_the_upstream_travel_as_bytes_and_leak_no_place(refiner):
    with faulty(refiner, "utf8_header", concurrency=1, queue=0) as (_, url):
        for _ in range(3):
            for extra in ({}, {"pfm": False}, {"stream": True}):
                answer = post(url, plain(model="tiny", **extra))
                assert answer.status_code == 200
                assert dict(answer.headers.raw)[b"x-model-name"] == "模型".encode()
        eventually(lambda: is_free(url))


def test_headers_of_hops_and_of_the_proxy_itself_do_not_pass_and_repeated_ones_do(refiner):
    with faulty(refiner, "spoofed") as (_, url):
        for extra in ({}, {"pfm": False}):
            answer = post(url, plain(model="tiny", **extra), origin="http://localhost:3")
            assert answer.headers.get_list("x-twice") == ["1", "2"]
            assert "x-hop" not in answer.headers
            assert answer.headers["x-pfm-refined"] == str(extra == {}).lower()
            assert "spoofed" not in str(answer.headers)
            assert answer.headers["access-control-allow-origin"] == "http://localhost:3"


def test_headers_of_the_client_pass_repeated_and_those_of_its_hop_do_not(refiner):
    seen = []

    def answer(connection: socket.socket) -> None:
        seen.append(connection.recv(100_000))
        connection.sendall(b"HTTP/1.1 204 Fine\r\n\r\n")

    body = json.dumps(plain(pfm={"n": 1})).encode()
    own = b"\r\nx-a: 1\r\nx-a: \xe6\xa8\xa1\r\nx-hop: 1\r\nconnection: x-hop, close\r\n\r\n"
    with raw_server(answer) as upstream, proxy(refiner, upstream) as url:
        for path in ("/v1/chat/completions", "/v1/embeddings"):
            with connect(url) as raw:
                raw.sendall(head(path, content_length=len(body)).replace(b"\r\n\r\n", own) + body)
                raw.recv(100)
    assert len(seen) == 2
    for request in seen:
        assert b"x-a: 1\r\nx-a: \xe6\xa8\xa1\r\n" in request
        assert b"x-hop" not in request


def test_two_proxies_that_point_at_each_other_are_found_out(refiner):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [listening.getsockname()[1] for listening in sockets]
    with contextlib.ExitStack() as stack:
        for listening in sockets:
            stack.callback(listening.close)
        for listening, other in zip(sockets, reversed(ports), strict=True):
            made = create_app(refiner, ServeConfig(upstream=f"http://127.0.0.1:{other}/v1", timeout=60))
            server = uvicorn.Server(uvicorn.Config(made, log_config=None))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
            thread.start()
            stack.callback(thread.join, 20)
            stack.callback(setattr, server, "should_exit", True)
        for path in ("/chat/completions", "/embeddings"):
            answer = post(f"http://127.0.0.1:{ports[0]}/v1", plain(pfm={"n": 1}), path)
            assert answer.status_code == 508
            assert "the proxy itself" in answer.text


def test_a_kept_connection_that_closes_without_an_answer_costs_a_repetition(refiner):
    with faulty(refiner, "stale") as (server, url):
        for number in range(4):
            answer = ask(
                url, "tiny", extra_body={"pfm": {"n": 1}}, messages=[{"role": "user", "content": f"{number}?"}]
            )
            assert answer.pfm["errors"] == {}
        assert post(url, plain(model="tiny", pfm=False)).status_code == 200
        assert len(server.requests) == 5


# ------------------------------------------------------------------------------------------------- what is encoded


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_too_long_to_encode_gets_one_answer_and_says_so(flow, upstream, chat, stream):
    encoder = TroubledEncoder()
    with proxy(pfm.Refiner(None, flow, encoder, pfm.decoders.Select(), 4), upstream) as url:
        chat.received.clear()
        messages = [{"role": "user", "content": "word " * 100_000}]
        answer = post(url, plain(messages=messages, stream=stream))
    evidence = json.loads(answer.text.split("data: ")[-2])["pfm"] if stream else answer.json()["pfm"]
    assert (answer.status_code, answer.headers["x-pfm-refined"]) == (200, "false")
    assert answer.headers["x-pfm-reason"] == evidence["reason"] == "the prompt is longer than 32768 characters"
    assert (evidence["refined"], evidence["calls"]) == (False, 1)
    assert "n" not in chat.bodies[-1]
    assert encoder.batches == encoder.prompts == []


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"text_characters": 40}, "a candidate is longer than 40 characters"),
        ({"judged_characters": 130}, "prompt and candidates are together longer than 130 characters"),
    ],
)
def test_candidates_too_long_to_encode_leave_the_original(flow, limits, reason):
    encoder = TroubledEncoder()
    refiner = pfm.Refiner(None, flow, encoder, pfm.decoders.Select(), 3)
    with (
        FaultServer(reply=lambda messages, number: f"{number} is an answer of more than 40 characters.") as server,
        proxy(refiner, server.url, **limits) as url,
    ):
        answer = ask(url, "tiny")
    assert answer.choices[0].message.content.startswith("0 ")
    assert answer.pfm["reason"] == reason
    assert encoder.batches == []


class SlowEncoder(TroubledEncoder):
    """Waits before each call until it is let through."""

    def __init__(self) -> None:
        super().__init__()
        self.may_encode = threading.Semaphore(0)

    def encode(self, texts, *, progress=False):
        self.batches.append(list(texts))
        assert self.may_encode.acquire(timeout=60)
        return self.encoder.encode(texts)


def judging(flow: pfm.PreferenceFlow, encoder: Any) -> Judge:
    return Judge(pfm.Refiner(None, flow, encoder, pfm.decoders.Select(), 4))


RULE = Rule("win_probability", None, 1.0, 0)
LONG = [f"Answer {k}. " + "word " * 3000 for k in range(24)]


def test_a_request_with_much_to_encode_does_not_hold_up_the_others(flow):
    encoder = SlowEncoder()
    judge = judging(flow, encoder)
    ended: list[str] = []

    async def refined(name: str, texts: list[str]) -> Any:
        result = await judge.refine(texts, MESSAGES, RULE)
        ended.append(name)
        return result

    async def both() -> list[Any]:
        jobs = [asyncio.create_task(refined("long", LONG))]
        while not encoder.batches:
            await asyncio.sleep(0.001)
        jobs += [asyncio.create_task(refined(f"short {k}", [f"Yes {k}.", f"no {k} lol"])) for k in range(3)]
        await asyncio.sleep(0)
        encoder.may_encode.release(100)
        return await asyncio.gather(*jobs)

    results = asyncio.run(both())
    judge.close()
    assert ended[-1] == "long"
    assert all(sum(map(len, batch)) <= SLICE_CHARACTERS + len(LONG[0]) for batch in encoder.batches)
    # the short ones are in the first slice after the one that they found at work
    assert all(any(text.startswith("Yes") for text in encoder.batches[1]) for _ in range(3))
    own = pfm.wrap(None, flow, encoder=pfm.encoders.SurfaceEncoder()).refine([LONG], [MESSAGES])[0]
    assert results[0].refinement.probabilities == pytest.approx(own.probabilities, abs=1e-5)


def test_short_texts_wait_for_one_long_text_at_most(flow):
    encoder = SlowEncoder()
    judge = judging(flow, encoder)
    ended: list[str] = []

    async def refined(name: str, texts: list[str]) -> None:
        await judge.refine(texts, MESSAGES, RULE)
        ended.append(name)

    async def all_of_them() -> None:
        jobs = [asyncio.create_task(refined(f"long {k}", [f"{k} " + "word " * 6000])) for k in range(5)]
        while not encoder.batches:
            await asyncio.sleep(0.001)
        jobs += [asyncio.create_task(refined(f"short {k}", [f"Yes {k}.", f"no {k} lol"])) for k in range(3)]
        await asyncio.sleep(0)
        encoder.may_encode.release(100)
        await asyncio.gather(*jobs)

    asyncio.run(all_of_them())
    judge.close()
    assert ended == ["long 0", "short 0", "short 1", "short 2", "long 1", "long 2", "long 3", "long 4"]
    assert [len(batch) for batch in encoder.batches] == [1, 6, 1, 1, 1, 1]


def test_what_a_gone_client_left_to_encode_is_dropped_between_slices(flow):
    encoder = SlowEncoder()
    judge = judging(flow, encoder)

    async def left() -> None:
        job = asyncio.create_task(judge.refine(LONG, MESSAGES, RULE))
        while not encoder.batches:
            await asyncio.sleep(0.001)
        job.cancel()
        await asyncio.sleep(0)
        encoder.may_encode.release(100)
        await judge.refine(["Yes.", "no lol"], MESSAGES, RULE)

    asyncio.run(left())
    judge.close()
    assert len(encoder.batches) == 2
    assert encoder.batches[1] == ["Yes.", "no lol"]


def test_a_shutdown_does_not_wait_for_an_encoder_that_hangs(flow, monkeypatch):
    monkeypatch.setattr("pfm.serve.judge.CLOSE_SECONDS", 0.01)
    encoder = SlowEncoder()
    judge = judging(flow, encoder)

    async def given_up() -> None:
        job = asyncio.create_task(judge.refine(["Yes.", "no lol"], MESSAGES, RULE))
        while not encoder.batches:
            await asyncio.sleep(0.001)
        job.cancel()
        await asyncio.sleep(0)
        judge.close()

    asyncio.run(given_up())
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "pfm-judge" and thread.daemon]
    encoder.may_encode.release(100)
    thread.join(60)


# ----------------------------------------------------------------------------------------------------------- bodies


def test_a_request_is_refused_before_its_body_is_read(refiner, upstream):
    with proxy(refiner, upstream, concurrency=1, queue=0) as url, connect(url) as first, connect(url) as second:
        first.sendall(head(content_length=1000) + b"{")
        eventually(lambda: health(url)["waiting"] == 1)
        second.sendall(head(content_length=5_000_000))
        assert second.recv(100).startswith(b"HTTP/1.1 429 ")
        first.close()
        eventually(lambda: is_free(url))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_request_larger_than_the_limit_is_refused(refiner, upstream, chunked):
    with proxy(refiner, upstream, request_bytes=1000) as url, connect(url) as raw:
        if chunked:
            raw.sendall(head(transfer_encoding="chunked") + b"fff\r\n" + b" " * 0xFFF + b"\r\n")
        else:
            raw.sendall(head(content_length=1001))
        answer = b""
        while b"larger than 1000 bytes" not in answer:
            answer += (piece := raw.recv(10_000))
            assert piece
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert post(url, plain()).json()["pfm"]["refined"]


def test_unfinished_bodies_share_a_limit(refiner, upstream):
    body = json.dumps(plain(user="x" * 90_000)).encode()
    with proxy(refiner, upstream, request_bytes=100_000, reply_bytes=5000, held_bytes=120_000) as url:
        with connect(url) as first:
            first.sendall(head(content_length=len(body)) + body[:80_000])
            eventually(lambda: metrics(url)["pfm_held_bytes"] == 80_000)
            busy = post(url, body)
            assert (busy.status_code, busy.headers["retry-after"]) == (503, "1")
            first.sendall(body[80_000:])
            assert first.recv(100).startswith(b"HTTP/1.1 200 ")
        eventually(lambda: metrics(url)["pfm_held_bytes"] == 0)
        assert post(url, body).status_code == 200


def test_large_bodies_are_parsed_beside_the_event_loop(refiner, upstream, monkeypatch):
    from pfm.serve import asked

    parsing, go_on = threading.Event(), threading.Event()

    def parse(content: bytes, **options: Any) -> Any:
        parsing.set()
        assert go_on.wait(60)
        return json.loads(content)

    monkeypatch.setattr(asked, "parse_json", parse)
    with proxy(refiner, upstream) as url:
        answers = []
        body = plain(user="x" * 200_000)
        asking = threading.Thread(target=lambda: answers.append(post(url, body)))
        asking.start()
        assert parsing.wait(60)
        assert health(url)["waiting"] == 1  # answered while the body is being parsed
        go_on.set()
        asking.join(60)
    assert answers[0].status_code == 200


def test_a_body_that_would_take_much_memory_is_passed_through_unread(refiner):
    sizes = []

    def take(connection: socket.socket) -> None:
        size = 0
        while size < len(content):
            size += len(connection.recv(1_000_000))
        sizes.append(size)
        connection.sendall(b"HTTP/1.1 204 Fine\r\n\r\n")

    content = b'{"model": "heeds-n", "messages": [' + b"[]," * 300_000 + b"1]}"
    with raw_server(take) as upstream, proxy(refiner, upstream) as url:
        answer = post(url, content)
    assert answer.status_code == 204
    assert answer.headers["x-pfm-reason"] == "the body is no JSON object"
    assert sizes[0] > len(content)


@pytest.mark.parametrize("fault", ["deep", "many"])
def test_json_of_the_upstream_that_would_take_much_is_passed_on(refiner, fault):
    with faulty(refiner, fault) as (_, url):
        answer = post(url, plain(model="tiny"))
        assert answer.status_code == 200
        assert answer.headers["x-pfm-refined"] == "false"
        assert answer.content.startswith(b'{"choices": [[')


def test_an_answer_larger_than_the_limit_is_an_error_and_holds_nothing(refiner):
    options = {"huge_bytes": 3_000_000}
    with faulty(refiner, "huge", options, reply_bytes=1_000_000) as (_, url):
        answer = post(url, plain(model="tiny"))
        assert answer.status_code == 502
        assert "larger than 1000000 bytes" in answer.text
        assert metrics(url)["pfm_held_bytes"] == 0


def test_memory_is_counted_once_and_given_back_once():
    memory = Memory(10)
    one, other = memory.held(), memory.held()
    one.add(6)
    other.add(4)
    with pytest.raises(Refused, match="busy"):
        other.add(1)
    one.close()
    one.close()
    one.add(1)  # what comes after the end is not counted
    assert memory.used == 4
    other.close()
    assert memory.used == 0


# ------------------------------------------------------------------------------------------------ slow and gone clients


def endless(connection: socket.socket) -> None:
    connection.recv(100_000)
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n")
    while True:
        connection.sendall(b"x" * 100_000)


def test_clients_that_do_not_read_lose_their_places_and_their_connections(refiner):
    with (
        raw_server(endless) as upstream,
        limited(refiner, upstream, concurrency=2, queue=0, send_timeout=0.5) as (url, server),
    ):
        raws = [connect(url) for _ in range(2)]
        for raw in raws:
            raw.sendall(b"GET /v1/files HTTP/1.1\r\nhost: localhost\r\n\r\n")
            raw.recv(10)
        eventually(lambda: is_free(url), 60)
        eventually(lambda: len(server.server_state.connections) <= 1, 60)  # of the health check, at most
        for raw in raws:
            raw.close()


def test_a_client_that_does_not_read_a_whole_answer_loses_its_connection(refiner):
    text = "word " * 2_000_000
    with (
        FaultServer(reply=lambda *_: text) as upstream,
        limited(refiner, upstream.url, send_timeout=0.5, text_characters=10) as (url, server),
        connect(url) as raw,
    ):
        body = json.dumps(plain(model="tiny", pfm={"n": 1})).encode()
        raw.sendall(head(content_length=len(body)) + body)
        raw.recv(10)
        eventually(lambda: not server.server_state.connections, 60)
        assert metrics(url)["pfm_held_bytes"] == 0


@pytest.mark.parametrize("first", [b"", b"GET /healthz HTTP/1.1\r\nx-slow: "])
def test_connections_whose_requests_do_not_arrive_are_closed(refiner, upstream, first):
    with limited(refiner, upstream, read_timeout=0.3) as (url, _), connect(url) as raw:
        stop = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while first and not stop.wait(0.05):
                    raw.sendall(b"x")

        raw.sendall(first)
        threading.Thread(target=drip, daemon=True).start()
        with contextlib.suppress(ConnectionResetError):
            assert raw.recv(100) == b""
        stop.set()
        assert is_free(url)


def test_a_body_that_does_not_arrive_is_a_408_and_frees_its_place(refiner, upstream):
    with proxy(refiner, upstream, concurrency=1, queue=0, read_timeout=0.3) as url:
        for path in ("/v1/chat/completions", "/v1/embeddings"):
            with connect(url) as raw:
                raw.sendall(head(path, content_length=10))
                assert raw.recv(100).startswith(b"HTTP/1.1 408 ")
        eventually(lambda: is_free(url))


def test_connections_beyond_the_limit_are_closed_and_it_is_said_once(refiner, upstream, caplog):
    with limited(refiner, upstream, clients=3) as (url, _), contextlib.ExitStack() as stack:
        for _ in range(3):
            held = stack.enter_context(connect(url))
            held.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert held.recv(100).startswith(b"HTTP/1.1 200 ")
        for _ in range(5):
            with connect(url) as further, contextlib.suppress(ConnectionResetError):
                assert further.recv(100) == b""
        held.close()
        eventually(lambda: _healthy(url))
    assert len([record for record in caplog.records if "further ones are closed" in record.getMessage()]) <= 1


def _healthy(url: str) -> bool:
    with contextlib.suppress(httpx2.RequestError):
        return health(url)["status"] == "ok"
    return False


def test_at_the_limit_of_file_descriptors_it_logs_once(caplog):
    async def many() -> None:
        handler = LoopErrors()
        for _ in range(1000):
            handler(asyncio.get_running_loop(), {"message": "accept", "exception": OSError(errno.EMFILE, "too many")})

    asyncio.run(many())
    assert len(caplog.records) == 1
    assert "file descriptor" in caplog.records[0].getMessage()


@pytest.mark.parametrize("size", [0, 10, 1_000_000])
def test_an_upload_arrives_whole_with_the_length_that_it_was_sent_with(refiner, size):
    received = []

    def take(connection: socket.socket) -> None:
        request = b""
        while not request.endswith(b"END"):
            if not (piece := connection.recv(100_000)):
                return
            request += piece
        received.append(request)
        connection.sendall(b"HTTP/1.1 204 Fine\r\n\r\n")

    body = b"x" * size + b"END"
    with raw_server(take) as upstream, proxy(refiner, upstream) as url:
        assert post(url, body, "/files").status_code == 204
    (request,) = received
    start, _, content = request.partition(b"\r\n\r\n")
    assert content == body
    assert f"content-length: {len(body)}".encode() in start.lower()
    assert b"transfer-encoding" not in start.lower()


@pytest.mark.parametrize("large", [False, True])
def test_a_client_that_leaves_a_passed_through_request_stops_the_upstream(refiner, large):
    arrived, gone = threading.Event(), threading.Event()

    def hang(connection: socket.socket) -> None:
        request = b""
        while not request.endswith(b"END") and not request.endswith(b"END\r\n0\r\n\r\n"):
            if not (piece := connection.recv(100_000)):
                return
            request += piece
        arrived.set()
        connection.recv(10)  # until it is closed
        gone.set()

    body = b"x" * (1_000_000 if large else 10) + b"END"
    with raw_server(hang) as upstream, proxy(refiner, upstream, concurrency=1, queue=0) as url:
        with connect(url) as raw:
            raw.sendall(head("/v1/embeddings", content_length=len(body)) + body)
            assert arrived.wait(60)
        assert gone.wait(60)
        eventually(lambda: is_free(url))
        assert metrics(url)['pfm_requests_total{endpoint="other",outcome="cancelled"}'] == 1


# --------------------------------------------------------------------------------------------------------- browsers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:8100", 200),
        ("[::1]:8100", 200),
        ("LOCALHOST:1", 200),
        ("rebind.evil.example", 403),
        ("localhost.evil.example:8100", 403),
        ("127.0.0.1.evil.example", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_a_proxy_on_loopback_answers_to_its_own_names_only(url, host, status):
    for path in ("/v1/models", "/healthz"):
        with connect(url) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
            assert raw.makefile("rb").readline().split()[1] == str(status).encode()


def test_hosts_and_origins_that_the_settings_name_are_allowed(refiner, upstream):
    settings = {"allowed_hosts": ["Proxy.example"], "allowed_origins": ["https://chat.example"]}
    with proxy(refiner, upstream, **settings) as url:
        assert post(url, plain(), host="proxy.example:8100").status_code == 200
        assert post(url, plain(), host="other.example").status_code == 403
        answer = post(url, plain(), origin="https://chat.example")
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        assert "Origin" in answer.headers["vary"]
        for other in ("https://chat.example:8443", "http://chat.example", "https://chat.example.evil", "null"):
            refused = post(url, plain(), origin=other)
            assert refused.status_code == 403
            assert "access-control-allow-origin" not in refused.headers


def test_the_own_page_works_without_a_token_under_a_name_that_the_settings_give(refiner, upstream):
    """A name that merely resolves to this server may be anyone's: a rebinding page has the same host and origin."""
    place = "proxy.example:8100"
    for names, status in (["Proxy.example"], 200), (["*"], 403), ([], 403):
        with proxy(refiner, upstream, host="0.0.0.0", allowed_hosts=names) as url:
            assert post(url, plain(), host=place, origin=f"http://{place}").status_code == status
            for other in ("http://proxy.example:8443", "http://proxy.example", "http://other.example:8100"):
                assert post(url, plain(), host=place, origin=other).status_code == 403


def test_a_preflight_is_answered_without_the_token(refiner, upstream, monkeypatch):
    monkeypatch.setenv("PROXY_TOKEN", "token-of-the-proxy")
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
        "access-control-request-private-network": "true",
    }
    settings: Any = {"allowed_origins": ["https://chat.example"], "token_env": "PROXY_TOKEN"}
    with proxy(refiner, upstream, **settings) as url:
        for origin, status in (("https://chat.example", 200), ("http://localhost:5173", 200), ("https://evil.x", 400)):
            found = httpx2.options(url + "/chat/completions", headers={**asked, "origin": origin})
            assert found.status_code == status
            assert (found.headers.get("access-control-allow-origin") == origin) == (status == 200)
        found = httpx2.options(url + "/chat/completions", headers={**asked, "origin": "https://chat.example"})
        assert found.headers["access-control-allow-headers"] == asked["access-control-request-headers"]
        assert "POST" in found.headers["access-control-allow-methods"]
        assert found.headers["access-control-allow-private-network"] == "true"
        # errors are readable for the page, too
        refused = post(url, plain(), origin="https://chat.example")
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://chat.example"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allowed_origins": ["chat.example"]}, "allowed_origins must hold origins, as https://chat.example"),
        ({"allowed_origins": ["https://chat.example/"]}, "allowed_origins must hold origins"),
        ({"allowed_hosts": ["http://proxy.example"]}, "allowed_hosts must hold host names"),
        ({"allowed_hosts": ["proxy.example:80"]}, "allowed_hosts must hold host names"),
        ({"request_bytes": 0}, "request_bytes must be a whole number of at least 1: got 0"),
        ({"held_bytes": 5}, "request_bytes must be at most held_bytes=5"),
        ({"send_timeout": 0}, "send_timeout must be a positive number"),
    ],
)
def test_limits_that_make_no_sense_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ServeConfig(upstream="http://host/v1", **settings)
    with pytest.raises(TypeError, match="allowed_hosts must be a list"):
        ServeConfig(upstream="http://host/v1", allowed_hosts="proxy.example")


# ------------------------------------------------------------------------------------------------------ keys and bytes


def test_errors_do_not_quote_what_the_upstream_sent(refiner):
    def garble(connection: socket.socket) -> None:
        connection.recv(100_000)
        connection.sendall(b"another-clients-secret: this is no status line\r\n\r\n")

    with raw_server(garble) as upstream, proxy(refiner, upstream) as url:
        for answer in (post(url, plain()), post(url, plain(pfm=False)), httpx2.get(url + "/files")):
            assert answer.status_code == 502
            assert "broke off" in answer.text
            assert "secret" not in answer.text


@pytest.mark.parametrize("extra", [{}, {"pfm": False}])
def test_the_upstreams_key_is_redacted_where_the_upstream_quotes_it(refiner, monkeypatch, extra, caplog):
    key = "sk-of-the-server-0123456789abcdef"
    monkeypatch.setenv("UPSTREAM_KEY", key)
    caplog.set_level(logging.DEBUG, "pfm")
    with faulty(refiner, "quotes_key", upstream_key_env="UPSTREAM_KEY") as (_, url):
        answer = post(url, plain(model="tiny", **extra))
    assert answer.status_code == 401
    message = answer.json()["error"]["message"]
    assert message.startswith(f"Incorrect API key provided: {'*' * len(key)}; that is *****")
    for part in (key, key[:12], key[-10:]):
        assert part not in answer.text + str(answer.headers) + caplog.text


@pytest.mark.parametrize("size", [1, 3, 7, 20, 1000])
@pytest.mark.parametrize("error", [False, True])
def test_a_key_is_redacted_across_the_pieces_of_a_stream(size, error):
    key = "sk-aaaabaaab-0123456789abcdef-xyz"
    content = f"sk- and sk-aaa and {key}{key} and ss{key[:25]} and {key[-20:]}. ".encode() * 3

    async def pieces():
        for start in range(0, len(content), size):
            yield content[start : start + size]

    async def all_of_it() -> bytes:
        return b"".join([piece async for piece in Redactor(key).pieces(pieces(), error=error)])

    found = asyncio.run(all_of_it())
    assert len(found) == len(content)
    assert found.startswith(b"sk- and sk-")
    assert found == Redactor(key).whole(content, error=error)
    assert key[:20].encode() not in found
    assert key[-20:].encode() not in found


def test_short_keys_are_redacted_in_errors_only():
    assert Redactor("none").whole(b"none of it", error=True) == b"**** of it"
    assert Redactor("none").whole(b"none of it", error=False) == b"none of it"
    assert Redactor(None).whole(b"none of it", error=True) == b"none of it"


# -------------------------------------------------------------------------------------------- what the upstream counts


def test_numbers_of_tokens_that_are_none_break_nothing(refiner):
    with faulty(refiner, "bad_usage") as (_, url):
        for stream in (False, True):
            answer = post(url, plain(model="tiny", stream=stream, stream_options={"include_usage": True}))
            assert answer.status_code == 200
            last = json.loads(answer.text.split("data: ")[-2]) if stream else answer.json()
            assert last["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0, "more": {"d": 0}}
            assert "NaN" not in answer.text
            assert "Infinity" not in answer.text
        assert metrics(url)['pfm_upstream_tokens_total{kind="prompt"}'] == 0


def test_usages_add_up_whatever_is_in_them():
    assert summed({"a": 1, "b": {"c": 2}}, {"a": 2.5, "b": {"c": 3, "d": None}, "e": "x"}) == {
        "a": 3.5,
        "b": {"c": 5, "d": None},
        "e": "x",
    }
    assert summed({"a": "x", "b": 3}, {"a": 1, "b": {"c": 10**400}}) == {"a": 1, "b": {"c": 0}}
    assert summed(None, {}) is None
    assert to_json({"a": [float("nan"), float("inf"), 1.5]}) == b'{"a": [null, null, 1.5]}'


# ------------------------------------------------------------------------------------------------ contents and requests


@pytest.mark.parametrize("content", [[{"type": "text", "text": "Hi"}], {"text": "Hi"}, 5, False, [], None])
def test_content_that_is_no_string_is_streamed_as_it_is(content):
    message = {"role": "assistant", "content": content, "tool_calls": "odd"}
    whole = {"id": "1", "choices": [{"message": message, "finish_reason": "stop"}]}
    *found, _ = events(whole, {}, include_usage=False)
    deltas = [json.loads(event.removeprefix(b"data: "))["choices"][0]["delta"] for event in found]
    assert [delta["content"] for delta in deltas if delta.get("content") not in (None, "")] == [content] * (
        content not in (None, "")
    )


def test_a_streamed_answer_of_parts_arrives(refiner):
    with faulty(refiner, "non_string") as (_, url):
        whole = post(url, plain(model="tiny")).json()
        chunks = ask(url, "tiny", stream=True)
    parts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert isinstance(parts[0], list)
    assert parts[0][0].keys() == whole["choices"][0]["message"]["content"][0].keys()
    assert chunks[-1].pfm["reason"] == whole["pfm"]["reason"] == "the answer is not text"


def test_a_long_streamed_answer_leaves_the_event_loop_to_others():
    order = []

    async def send(message: Any) -> None:
        order.append(message["type"])

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def both() -> None:
        response = streamed_response(iter([b"piece"] * 1000), [])
        sending = asyncio.create_task(response({"type": "http"}, receive, send))
        while not sending.done():
            await asyncio.sleep(0)
            order.append("another request")

    asyncio.run(both())
    last = len(order) - order[::-1].index("http.response.body")
    assert order[:last].count("another request") > 10


NUMBER = "9" * 400


@pytest.mark.parametrize(
    "extension",
    [
        f'{{"n": {NUMBER}}}',
        '{"n": 1e400}',
        f'{{"margin": {NUMBER}}}',
        f'{{"strength": {NUMBER}, "by": "sample"}}',
        '{"strength": NaN}',
        '{"by": "\\ud800"}',
        '{"by": ["a"]}',
        '{"\\ud800": 1}',
        '"\\ud800"',
    ],
)
def test_values_that_no_number_or_text_holds_are_a_400(url, extension):
    content = json.dumps(plain()).replace("{", f'{{"pfm": {extension}, ', 1).encode()
    answer = post(url, content)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "pfm_bad_request"
    assert len(answer.content) < 1000


def test_addresses_and_origins_that_are_malformed_are_a_400(url, refiner, upstream):
    assert post(url, plain(), origin="http://[::1").status_code == 400
    with connect(url) as raw:
        raw.sendall(b"GET /v1/files?q=\xff HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        assert b" 400 " in raw.makefile("rb").readline()
    with proxy(refiner, f"{upstream}/{'p' * 2000}", concurrency=1, queue=0) as long:  # addresses end at 64 KiB
        for path in ("/chat/completions", "/embeddings"):
            assert post(long, plain(), f"{path}?q={'x' * 64_000}").status_code == 400
        assert is_free(long)


@pytest.mark.parametrize("status", [101, 600, 999])
def test_a_status_that_cannot_be_passed_on_is_a_502(refiner, status):
    def answer(connection: socket.socket) -> None:
        connection.recv(100_000)
        connection.sendall(f"HTTP/1.1 {status} Odd\r\ncontent-length: 0\r\n\r\n".encode())

    with raw_server(answer) as upstream, proxy(refiner, upstream, concurrency=1, queue=0) as url:
        for body in (plain(), plain(pfm=False)):
            found = post(url, body)
            assert (found.status_code, found.json()["error"]["type"]) == (502, "upstream_failed")
        eventually(lambda: is_free(url))


def test_an_error_that_nobody_expected_quotes_nothing(refiner, upstream, monkeypatch, caplog):
    def fail(*_: Any) -> None:
        raise RuntimeError(f"secret {KEY}")

    monkeypatch.setattr("pfm.serve.refining.read", fail)
    with proxy(refiner, upstream, concurrency=1, queue=0) as url:
        for _ in range(2):
            with client(url) as asking, pytest.raises(openai.InternalServerError, match="the proxy failed"):
                asking.chat.completions.create(model="one", messages=MESSAGES)
    assert KEY not in caplog.text
    assert "RuntimeError" in caplog.text
