"""Proxies of the environment: none for this machine, the right one elsewhere, and an unusable one named early."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest
from support.chat_server import ChatServer, running
from support.command_line import run
from support.letters import LetterEncoder, LinearFlow

from pfm._internal.endpoint import Endpoint
from pfm._internal.hub import loading_problem
from pfm._internal.proxies import is_own_address, proxied_client, proxy_of
from pfm.encoders import OpenAIEncoder
from pfm.generators import OpenAIGenerator
from pfm.refiner import wrap
from pfm.serve import ServeConfig, create_app

FAR = "http://model.example:8000/v1"
NAMES = [f"{scheme}_proxy" for scheme in ("http", "https", "all", "no")]
UNUSABLE = {
    "socks://127.0.0.1:1080": "write socks5://",
    "socks4://127.0.0.1:1080": "write socks5://",
    "ftp://proxy.example": "write http://",
    "http://": "names no host",
    "http://proxy.example:port": "write it as http://host:port",
    "http://[::1": "write it as http://host:port",
}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Relay(BaseHTTPRequestHandler):
    """Answers in place of whatever it is asked for, as a proxy, and keeps the addresses."""

    asked: list[str]

    def do_POST(self) -> None:
        self.asked.append(self.path)
        self.rfile.read(int(self.headers["content-length"]))
        message = b'{"choices": [{"message": {"role": "assistant", "content": "from afar"}}]}'
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(message)))
        self.end_headers()
        self.wfile.write(message)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def relay():
    handler = type("Relaying", (Relay,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://user:pass-word@127.0.0.1:{server.server_address[1]}", handler.asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def local():
    with running(ChatServer().app) as url:
        yield url


def ask(url: str, how: str) -> list[str]:
    generator = OpenAIGenerator("one", base_url=url, max_retries=0)
    if how == "sync":
        (draw,) = generator.draws(["p"], 1)
    else:
        import asyncio

        async def first():
            return [draw async for draw in generator.adraws(["p"], 1)]

        (draw,) = asyncio.run(first())
    assert draw.error is None
    return draw.texts


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:1080", "http://127.0.0.1:1", "socks5://127.0.0.1:1"])
@pytest.mark.parametrize("variable", ["http_proxy", "ALL_PROXY"])
def test_a_server_on_this_machine_is_asked_directly(proxy, variable, local, monkeypatch):
    monkeypatch.setenv(variable, proxy)
    assert ask(local, "sync")
    assert ask(local.replace("127.0.0.1", "localhost"), "async")
    refiner = wrap(None, LinearFlow(), encoder=LetterEncoder(), n=2)
    with running(create_app(refiner, ServeConfig(upstream=local))) as url, httpx2.Client(trust_env=False) as client:
        body = {"model": "one", "messages": [{"role": "user", "content": "p"}]}
        assert client.post(f"{url}/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("proxy", UNUSABLE)
def test_an_unusable_proxy_is_named_before_any_request(proxy, monkeypatch):
    monkeypatch.setenv("all_proxy", proxy)
    refiner = wrap(None, LinearFlow(), encoder=LetterEncoder(), n=2)
    for make in (
        lambda: OpenAIGenerator("m", base_url=FAR),
        lambda: OpenAIEncoder("m", base_url=FAR, cache=False),
        lambda: create_app(refiner, ServeConfig(upstream=FAR)),
    ):
        with pytest.raises(ValueError, match=r"all_proxy names the proxy .* for model.example") as caught:
            make()
        assert UNUSABLE[proxy] in str(caught.value)
        assert "add model.example to no_proxy" in str(caught.value)


def test_what_is_wrong_with_a_proxy_is_no_answer_of_a_server(monkeypatch):
    generator = OpenAIGenerator("m", base_url=FAR)
    monkeypatch.setenv("HTTP_PROXY", "socks://user:pass-word@127.0.0.1:1080")
    with pytest.raises(ValueError, match="HTTP_PROXY names the proxy socks://127") as caught:
        list(generator.draws(["p"], 1))
    assert "pass-word" not in str(caught.value)


def test_socks_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:1080")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install socksio"):
        Endpoint(FAR).client()


@pytest.mark.parametrize("how", ["sync", "async"])
def test_other_addresses_go_through_the_proxy(how, relay, monkeypatch):
    proxy, asked = relay
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("all_proxy", "socks://nowhere")  # not the one of this address
    assert ask(FAR, how) == ["from afar"]
    assert asked == [f"{FAR}/chat/completions"]


def test_a_proxy_that_does_not_answer_is_named_with_the_server(monkeypatch):
    monkeypatch.setenv("http_proxy", "user:pass-word@127.0.0.1:1")
    (draw,) = OpenAIGenerator("m", base_url=FAR, max_retries=0).draws(["p"], 1)
    assert f"nothing answers at {FAR} through the proxy http://127.0.0.1:1 of http_proxy" in str(draw.error)
    assert "is the proxy running" in str(draw.error)
    assert "pass-word" not in str(draw.error)


@pytest.mark.parametrize(
    ("url", "excluded"),
    [
        ("http://a.example/v1", "a.example"),
        ("http://a.b.example/v1", ".b.example"),
        ("http://10.1.2.3/v1", "10.0.0.0/8"),
        ("http://[fd00::1]/v1", "fd00::/8"),
        ("http://a.example/v1", "x.example, *"),
        ("http://a.example:8/v1", "a.example:8"),
    ],
)
def test_no_proxy_excludes_names_addresses_and_networks(url, excluded, monkeypatch):
    monkeypatch.setenv("all_proxy", "socks://127.0.0.1:1080")
    with pytest.raises(ValueError, match="cannot be used"):
        proxy_of(url)
    monkeypatch.setenv("no_proxy", excluded)
    assert proxy_of(url) is None
    Endpoint(url).client().close()


def test_addresses_of_this_machine_are_known():
    own = [
        "localhost",
        "LOCALHOST.",
        "api.localhost",
        "127.0.0.1",
        "127.8.8.8",
        "::1",
        "[::1]",
        "0.0.0.0",
        "::",
        "::ffff:127.0.0.1",
    ]
    assert [host for host in own if not is_own_address(host)] == []
    assert not any(map(is_own_address, ["example.org", "10.0.0.1", "localhost.example.org", "notlocalhost", ""]))


def test_a_model_behind_an_unusable_proxy_names_the_proxy(monkeypatch):
    monkeypatch.setenv("all_proxy", "socks://user:pass-word@127.0.0.1:1080")
    unknown = ValueError("Unknown scheme for proxy URL URL('socks://user:[secure]@127.0.0.1:1080')")
    assert "all_proxy names the proxy socks://127.0.0.1:1080 for huggingface.co" in loading_problem("a/b", unknown)
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:1080")
    assert "through the proxy http://127.0.0.1:1080 of all_proxy" in loading_problem(
        "a/b", ValueError("ProxyError: 502")
    )


def test_the_commands_name_an_unusable_proxy_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("all_proxy", "socks://127.0.0.1:1080")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "candidates": ["a", "b"]}\n')
    shown = run(
        "label", tmp_path / "rows.jsonl", "--model", "m", "--base-url", FAR, "--out", tmp_path / "o.jsonl", code=2
    )
    assert "Error: all_proxy names the proxy socks://127.0.0.1:1080" in shown.output
    assert "Traceback" not in shown.output


def test_a_client_without_a_proxy_keeps_its_limits():
    limits = httpx2.Limits(max_connections=3)
    with proxied_client(httpx2.Client, httpx2.HTTPTransport, FAR, limits=limits) as client:
        assert client._transport._pool._max_connections == 3
