"""Where prompts and keys may go, what an answer may take, and what errors may show."""

from __future__ import annotations

import asyncio
import gzip
import json
import pickle
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import openai
import pytest
from support.fault_server import FaultServer

from pfm._internal import endpoint as module
from pfm._internal.endpoint import Endpoint, origin, public_address, redacted
from pfm._internal.proxies import is_own_address
from pfm.encoders import OpenAIEncoder, encoder_from_description
from pfm.errors import EncodingError, MissingKeyError, UntrustedEncoderError
from pfm.generators import Draw, OpenAIGenerator
from pfm.generators.sampling import Several

KEY = "sk-live-5ecret-0f-the-tests"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def drawn(generator: OpenAIGenerator, how: str = "sync", n: int = 1, prompts: int = 1) -> list[Draw]:
    texts = [f"Question {number}?" for number in range(prompts)]
    if how == "sync":
        return list(generator.draws(texts, n))

    async def collect() -> list[Draw]:
        return [draw async for draw in generator.adraws(texts, n)]

    return asyncio.run(collect())


class Raw(ThreadingHTTPServer):
    """Answers every request with what ``answer(handler)`` writes, and notes the headers that came."""

    daemon_threads = True

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None]) -> None:
        came: list[dict[str, str]] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                came.append({name.lower(): value for name, value in self.headers.items()})
                self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer(self)

            def log_message(self, *_: Any) -> None:
                pass

            do_GET = do_POST

        super().__init__(("127.0.0.1", 0), Handler)
        self.came = came
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> Raw:
        Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that hang up are the point."""


def sent(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


# ---------------------------------------------------------------------------------------------- where a key may go


@pytest.mark.parametrize(
    ("address", "own", "sent_key"),
    [
        (None, None, True),
        ("https://api.openai.com/v1", None, True),
        ("https://API.openai.com:443/other", None, True),
        ("http://api.openai.com/v1", None, False),
        ("https://api.openai.com:8443/v1", None, False),
        ("https://api.openai.com.evil.example/v1", None, False),
        ("https://evil.example/v1", None, False),
        ("http://127.0.0.1:8000/v1", None, False),
        (None, "http://127.0.0.1:8000/v1", True),
        ("http://127.0.0.1:8000/v2", "http://127.0.0.1:8000/v1", True),
        ("http://127.0.0.1:8001/v1", "http://127.0.0.1:8000/v1", False),
        ("https://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1", False),
        (None, "http://gpu.example:8000/v1", False),
        (None, "https://gpu.example:8000/v1", True),
        ("http://gpu.example:8000/v1", "https://gpu.example:8000/v1", False),
        (None, "http://[::1]:8000/v1", True),
    ],
)
def test_the_environments_key_goes_to_its_origin_and_never_in_the_clear(address, own, sent_key, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    if own:
        monkeypatch.setenv("OPENAI_BASE_URL", own)
    place = Endpoint(address)
    assert (place.key() == KEY) == sent_key
    assert ("is not sent to" in caplog.text) == (own == "http://gpu.example:8000/v1" and not address)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")  # another one later on
    assert (place.key() == KEY) == (sent_key and origin(place.base_url) == origin("https://api.openai.com"))


def test_white_space_around_a_key_is_no_part_of_it(monkeypatch):
    with FaultServer() as server:
        for given in (f"{KEY}\n", f"  {KEY}\r\n"):
            (draw,) = drawn(OpenAIGenerator("tiny", base_url=server.url, api_key=given, cache=False))
            assert draw.error is None
        for given in ("", " \n"):  # a server that needs none
            (draw,) = drawn(OpenAIGenerator("tiny", base_url=server.url, api_key=given, cache=False))
            assert draw.error is None
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    assert Endpoint().key() == KEY
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    with pytest.raises(MissingKeyError):
        Endpoint(api_key="").key()


@pytest.mark.parametrize(("wrong", "place"), [(f"{KEY[:8]}\u2013{KEY[9:]}", 9), (f"{KEY[:3]}\n{KEY[4:]}", 4)])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(wrong, place, monkeypatch):
    with pytest.raises(ValueError, match=rf"^api_key must .* character {place} of {len(KEY)} is none") as caught:
        OpenAIGenerator("m", base_url="http://127.0.0.1:1/v1", api_key=wrong)
    assert not any(part in str(caught.value) for part in (KEY[:6], KEY[-6:]))
    monkeypatch.setenv("OPENAI_API_KEY", wrong)
    with pytest.raises(ValueError, match=r"^OPENAI_API_KEY must "):
        Endpoint().key()


@pytest.mark.parametrize("make", [OpenAIGenerator, OpenAIEncoder])
def test_a_key_that_would_go_in_the_clear_is_refused(make):
    for address in ("http://gpu.example/v1", "http://10.0.0.7:8000/v1", "http://localhost.evil.example/v1"):
        with pytest.raises(ValueError, match="would be sent in the clear to http://") as caught:
            make("m", base_url=address, api_key=KEY)
        assert KEY not in str(caught.value)
        make("m", base_url=address, api_key="EMPTY")
    for address in ("https://gpu.example/v1", "http://localhost:1/v1", "http://127.9.9.9/v1", "http://0.0.0.0:1/v1"):
        make("m", base_url=address, api_key=KEY)


def test_a_client_of_ones_own_is_the_users_affair():
    client = openai.OpenAI(
        base_url="http://gpu.example/v1?a=b", api_key=KEY, default_headers={"X-Secret": "hidden-one"}
    )
    generator = OpenAIGenerator("m", client=client)
    assert {KEY, "hidden-one"} <= set(generator._endpoint.secrets())
    assert generator.base_url == "http://gpu.example/v1"


@pytest.mark.parametrize(
    ("host", "own"),
    [("localhost", True), ("LOCALHOST.", True), ("a.localhost", True), ("127.1.2.3", True), ("::1", True),
     ("::ffff:127.0.0.1", True), ("0.0.0.0", True), ("10.0.0.1", False), ("localhost.com", False),
     ("127.0.0.1.nip.io", False), ("", False), ("169.254.169.254", False)],
)  # fmt: skip
def test_this_machine_is_known_by_its_names(host, own):
    assert is_own_address(host) == own


# ------------------------------------------------------------------------------------------- what addresses may show


@pytest.mark.parametrize(
    "address",
    [
        "http://me:pa55@host/v1", "me:pa55@host/v1", "http://me:pa#55@host/v1", "http://me:pa/55@host/v1",
        "http://me:pa?55@host", "http:/me:pa55@host", "http://[me:pa55@host", "http://me:pa\uff0f55@host",
        "https://host:pa55/v1", "sk-pa55", "pa55", "://pa55", "ftp://pa55.example/v1", "http://?key=pa55",
        "http://host/v1?key=pa55", "http://host/v1#pa55", "http://ho st/pa55", "http://host\npa55/v1", "http://[::1/pa55",
        "http://host/v1\x1b[2Jpa55",
    ],
)  # fmt: skip
def test_what_may_be_a_password_in_an_address_is_never_repeated(address, capfd):
    for make in (Endpoint, lambda base_url: OpenAIGenerator("m", base_url=base_url)):
        with pytest.raises(ValueError, match=r"^base_url must") as caught:
            make(address)
        error: BaseException | None = caught.value
        while error is not None:
            assert "55" not in str(error)
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    shown = public_address(address)
    assert "@" not in shown
    assert shown == "(no address)" or "pa55@" not in shown


@pytest.mark.parametrize("address", ["localhost:8000", "127.0.0.1:8000/v1", "api.openai.com/v1"])
def test_an_address_without_a_scheme_is_shown(address):
    with pytest.raises(ValueError, match=f"with http:// or https://, got '{address}'"):
        Endpoint(address)


# ------------------------------------------------------------------------------------------------------- redirects


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed_with_prompts_and_keys(status, how):
    with FaultServer() as other:
        target = f"http://me:pa55@127.0.0.1:{other.server_port}/v1/chat/completions?token=pa55"
        with Raw(lambda handler: sent(handler, status, b"", Location=target)) as server:
            generator = OpenAIGenerator("tiny", base_url=server.url, extra_headers={"X-Api-Key": KEY}, max_retries=0)
            (draw,) = drawn(generator, how)
            assert draw.error is not None
            assert draw.error.startswith(
                f"EndpointError: {server.url} answered {status}, a redirect to http://127.0.0.1:"
            )
            assert "pa55" not in draw.error
            assert server.came[0]["x-api-key"] == KEY
        assert not other.requests


def test_an_encoders_texts_are_not_redirected_either(tmp_path):
    with FaultServer() as other, Raw(lambda handler: sent(handler, 307, b"", Location=f"{other.url}/x")) as server:
        with pytest.raises(EncodingError, match="307"):
            OpenAIEncoder("m", base_url=server.url, api_key=KEY, cache=tmp_path, max_retries=0).encode(["a"])
        assert not other.requests


# --------------------------------------------------------------------------------------------- what an answer may take


ANSWER = {
    "id": "1", "object": "chat.completion", "created": 0, "model": "tiny",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hello."}}],
}  # fmt: skip


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd", "br", "nonsense", "gzip, gzip"])
def test_a_small_body_that_unpacks_to_a_huge_one_is_not_unpacked(coding, how, monkeypatch):
    monkeypatch.setattr(module, "MAX_ANSWER_BYTES", 1_000_000)
    pack = zlib.compress if coding == "deflate" else gzip.compress
    body = pack(json.dumps(ANSWER).encode() + b" " * 3_000_000)
    assert len(body) < 10_000
    with Raw(
        lambda handler: sent(handler, 200, body, Content_Encoding=coding, Content_Type="application/json")
    ) as server:
        (draw,) = drawn(OpenAIGenerator("tiny", base_url=server.url, max_retries=0), how)
    assert server.came[0]["accept-encoding"] == "identity"
    assert draw.error is not None
    assert "larger than 1,000,000 bytes" in draw.error or "was not asked for" in draw.error


@pytest.mark.parametrize("coding", ["gzip", "identity"])
def test_what_a_server_packs_unasked_is_read_all_the_same(coding):
    body = json.dumps(ANSWER).encode()
    body = gzip.compress(body) if coding == "gzip" else body
    with Raw(
        lambda handler: sent(handler, 200, body, Content_Encoding=coding, Content_Type="application/json")
    ) as server:
        (draw,) = drawn(OpenAIGenerator("tiny", base_url=server.url, max_retries=0))
    assert draw.texts == ["Hello."]


@pytest.mark.parametrize("status", [200, 400, 503])
def test_a_body_that_says_it_is_huge_is_not_begun(status):
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(5 * 10**9))
        handler.end_headers()
        handler.close_connection = True

    with Raw(answer) as server:
        (draw,) = drawn(OpenAIGenerator("tiny", base_url=server.url, max_retries=0))
    assert draw.error is not None
    assert "larger than 32,000,000 bytes" in draw.error


# ---------------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize("before", range(280, 310, 3))
def test_a_cut_leaves_no_beginning_of_a_key(before):
    message = "x" * before + KEY + " is wrong, and so is " + KEY[:12] + "... and " + KEY[5:]
    body = json.dumps({"error": {"message": message}}).encode()
    with Raw(lambda handler: sent(handler, 400, body, Content_Type="application/json")) as server:
        (draw,) = drawn(OpenAIGenerator("tiny", base_url=server.url, api_key=KEY, max_retries=0))
    assert draw.error is not None
    assert not any(KEY[at : at + 8] in draw.error for at in range(len(KEY) - 7))


def test_texts_are_redacted_in_any_spelling():
    key = 'a/b+c "quoted" ü'
    for spelled in (key, json.dumps(key), repr(key), "a%2Fb%2Bc%20%22quoted%22%20%C3%BC"):
        assert redacted(f"got {spelled}!", [key]).strip("'\"").replace("'", "").replace('"', "") == "got ***!"
    assert redacted("no secret here", ["", "other-secret"]) == "no secret here"
    assert redacted("x" * 700, ["secret-text"]) == "x" * 600 + "..."


EXTRAS = {
    "extra_headers": {"X-Custom": "header-5ecret-value"},
    "extra_query": {"tenant": "query-5ecret-value"},
    "extra_body": {"top_k": 3, "nested": {"list": ["body-5ecret-value"]}},
}


def test_values_of_headers_query_and_body_are_shown_nowhere(caplog):
    def quoting(handler: BaseHTTPRequestHandler) -> None:
        text = f"{handler.headers['X-Custom']} {handler.path} body-5ecret-value"
        sent(handler, 400, json.dumps({"error": {"message": text}}).encode(), Content_Type="application/json")

    with Raw(quoting) as server:
        generator = OpenAIGenerator("tiny", base_url=server.url, api_key=KEY, **EXTRAS)
        shown = [str(drawn(generator, how)) for how in ("sync", "async")]
    shown += [repr(generator), pickle.dumps(generator).decode("latin-1"), repr(generator._endpoint), caplog.text]
    assert "answered 400" in shown[0]
    assert "5ecret-value" not in " ".join(shown)


def test_a_pickled_generator_says_what_it_has_forgotten():
    with FaultServer() as server:
        for name, value in EXTRAS.items():
            again = pickle.loads(pickle.dumps(OpenAIGenerator("tiny", base_url=server.url, **{name: value})))
            for generator in (again, pickle.loads(pickle.dumps(again))):
                with pytest.raises(MissingKeyError, match=f"pickled without the texts in {name}"):
                    drawn(generator)
        kept = pickle.loads(pickle.dumps(OpenAIGenerator("tiny", base_url=server.url, extra_body={"top_k": 3})))
        assert drawn(kept)[0].error is None
        assert server.requests[-1][2]["top_k"] == 3


@pytest.mark.parametrize("value", ["key=5ecret", [("key", "5ecret")], {1: "5ecret"}, 5])
@pytest.mark.parametrize("name", EXTRAS)
def test_extras_of_another_type_are_refused_without_repeating_them(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a dict") as caught:
        OpenAIGenerator("m", base_url="http://127.0.0.1:1/v1", **{name: value})
    assert "5ecret" not in str(caught.value)


# ----------------------------------------------------------------------------------------- a moment's refusal of n


def refusing_once(message: str) -> tuple[Callable[[BaseHTTPRequestHandler], None], list[int]]:
    """Refuse the first request for several choices, and note how many each request asks for."""
    asked: list[int] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        n = handler.body.get("n", 1)  # pyright: ignore[reportAttributeAccessIssue]
        asked.append(n)
        if n > 1 and len([number for number in asked if number > 1]) == 1:
            body = {"error": {"message": message}}
            sent(handler, 400, json.dumps(body).encode(), Content_Type="application/json")
            return
        choice = ANSWER["choices"][0]
        body = ANSWER | {"choices": [choice | {"index": number} for number in range(n)]}
        sent(handler, 200, json.dumps(body).encode(), Content_Type="application/json")

    return answer, asked


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize(("message", "single"), [("Please try again.", 1), ("n must be 1 right now", 64)])
def test_one_refusal_does_not_multiply_calls_for_ever(message, single, how):
    answer, asked = refusing_once(message)
    with Raw(answer) as server:
        generator = OpenAIGenerator("tiny", base_url=server.url, concurrency=1, max_retries=0)
        for draw in drawn(generator, how, n=3, prompts=single + 20):
            assert len(draw.texts) == 3
    # The first prompt is refused and asked in three; so are the next ones, until several are tried again.
    assert asked == [3, *[1] * 3 * (single + 1), *[3] * 19]


def test_what_prompts_at_one_time_meet_is_learned_once():
    several = Several()
    seen = several.round
    for _ in range(8):  # under way together
        several.fail(seen, named=False)
    assert [several.bound() for _ in range(3)] == [1, None, 1]  # one tries; those beside it do not
    several.fail(several.round, named=False)
    assert [several.bound() for _ in range(4)] == [1, 1, None, 1]
    several.succeed()
    assert [several.bound() for _ in range(3)] == [None] * 3
    for _ in range(30):
        several.fail(several.round, named=True)
    assert [several.bound() for _ in range(1025)].count(None) == 1
    assert Several(1).bound() == 1


# -------------------------------------------------------------------------------------- encoders that strangers name


def sentence(name: Any) -> dict[str, Any]:
    return {
        "type": "SentenceEncoder", "name": name, "revision": None, "normalize": True, "long_texts": "chunk",
        "truncate_dim": None, "prompts": {},
    }  # fmt: skip


ENDPOINT = {
    "type": "OpenAIEncoder",
    "name": "m",
    "endpoint": "http://evil.example/v1",
    "dimensions": 5,
    "normalize": True,
}


@pytest.mark.parametrize(
    ("description", "told"),
    [
        (ENDPOINT, "an encoder at http://evil.example/v1, which would receive all prompts"),
        (ENDPOINT | {"endpoint": "https://api.openai.com/v1"}, "an encoder at https://api.openai.com/v1"),
        (ENDPOINT | {"endpoint": "http://me:pa55@evil.example/v1?q=pa55"}, "an encoder at http://evil.example/v1,"),
        (ENDPOINT | {"endpoint": None}, "an encoder at"),
        (sentence("/tmp/evil"), "a model in the folder '/tmp/evil', which may hold code"),
        (sentence("evil/model"), "the folder 'evil/model'"),
        (sentence("evil"), "the folder 'evil'"),
        (sentence("../evil"), "folder"),
        (sentence("~/evil"), "folder"),
        (sentence(r"\\evil.example\share"), "folder"),
        (sentence("https://evil.example/model"), "folder"),
        (sentence("a/b/c"), "folder"),
        (sentence("minilm\n"), "folder"),
        (
            {"type": "ConcatEncoder", "encoders": [sentence("/a"), ENDPOINT], "weights": [1, 1]},
            "'/a', .* and an encoder",
        ),
    ],
)
def test_what_a_strangers_flow_names_is_not_contacted_without_consent(description, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil" / "model").mkdir(parents=True)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UntrustedEncoderError, match=f"the flow names .*{told}") as caught:
        encoder_from_description(description)
    assert "trust_encoder=True" in str(caught.value)
    assert "pa55" not in str(caught.value)


def test_with_consent_an_endpoint_is_used_and_gets_no_key_in_the_clear(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    encoder = encoder_from_description(ENDPOINT, trust_encoder=True)
    assert isinstance(encoder, OpenAIEncoder)
    assert encoder._endpoint is not None
    assert encoder._endpoint.key() == "none"


@pytest.mark.parametrize(
    "description",
    [
        [], "minilm", 7, {"type": []}, sentence(None), sentence({"a": 1}), sentence("m") | {"prompts": 7},
        sentence("m") | {"truncate_dim": "x"}, sentence("m") | {"prompts": {"query": 1}, "long_texts": []},
        {"type": "ConcatEncoder", "encoders": 7, "weights": []}, {"type": "ConcatEncoder", "encoders": ["a"]},
        {"type": "ConcatEncoder", "encoders": [sentence("m")], "weights": "x"},
        {"type": "eval", "name": "__import__('os')"},
    ],
)  # fmt: skip
def test_descriptions_that_are_none_are_refused(description):
    with pytest.raises(ValueError, match=r"by hand|must be|must hold"):
        encoder_from_description(description)


def test_a_description_without_end_is_refused():
    description: dict[str, Any] = {"type": "SurfaceEncoder"}
    for _ in range(50_000):
        description = {"type": "ConcatEncoder", "encoders": [description], "weights": [1.0]}
    with pytest.raises(ValueError, match="damaged"):
        encoder_from_description(description)
    while description.get("encoders"):  # taken apart here: the interpreter frees deep nests by recursion
        description = description.pop("encoders")[0]
