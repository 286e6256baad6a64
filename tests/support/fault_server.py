"""A server on loopback that speaks the chat-completions protocol, and misbehaves on purpose.

With ``FaultServer({"500": 0.1, "cut": 0.1}, seed=3) as server`` a client is pointed at ``server.url``. Whether a
request meets a fault, and which, depends on the seed, on the request's body and on how often that body has come
before, so a run over the same requests meets the same faults whatever the order in which its threads send them.
Replies are a function of the messages, the request's ``seed`` and the place of the choice. Without a ``seed`` they
differ each time that the messages come.

By hand: ``python tests/support/fault_server.py --port 8000 --fault 500=0.1 --fault cut=0.1``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = {
    "429": "too many requests, with Retry-After",
    "500": "an error of the server",
    "hang": "no answer at all, until the client gives up",
    "reset": "the connection is closed before the first byte",
    "cut": "the connection is closed in the middle of the body",
    "invalid_json": "a body that is not JSON, said to be",
    "empty_choices": "an answer without a choice",
    "content_type": "a web page in place of an answer",
    "trickle": "a body that comes drop by drop, too slowly ever to end",
    "huge": "a body of many megabytes",
    "non_string": "content that is no text",
    "tool_calls": "a call of a tool in place of a text",
    "blank": "a text of only white space",
    "content_filter": "a choice that a filter has emptied",
    "refused_content": "a request that a filter has refused",
}
# Answers that can be used, with something in them that must not harm whoever passes them on.
ODDITIES = {
    "utf8_header": "a header whose value is UTF-8",
    "spoofed": "headers of the connection, of the proxy itself and of browsers' rules, and one that comes twice",
    "bad_usage": "numbers of tokens that are NaN, infinite, negative or of 400 digits",
    "deep": "JSON of 100,000 nested lists",
    "many": "JSON of 600,000 small lists",
    "quotes_key": "status 401, and a body that quotes the key, whole and cut",
    "stale": "an answer after which the connection is kept open until the next request comes on it, and then closed",
}
MIXED = ("429", "500", "reset", "cut", "invalid_json", "empty_choices", "content_type", "hang", "trickle", "huge")
SPOOFED = {
    "connection": "x-hop, keep-alive",
    "x-hop": "1",
    "x-pfm-refined": "spoofed",
    "x-pfm-reason": "spoofed",
    "access-control-allow-origin": "*",
}
WORDS = ("stone", "river", "lamp", "garden", "wind", "paper", "bridge", "cloud")

Reply = Callable[[list[dict[str, Any]], int], str]


def mixed_faults(share: float, kinds: Sequence[str] = MIXED) -> dict[str, float]:
    """Spread a share of all requests evenly over kinds of faults."""
    return dict.fromkeys(kinds, share / len(kinds))


def default_reply(messages: list[dict[str, Any]], number: int) -> str:
    """Write a reply: half of them are sentences, the others shout."""
    digest = hashlib.sha256(f"{json.dumps(messages, sort_keys=True)}\n{number}".encode()).digest()
    source = random.Random(digest)
    text = " ".join(source.choices(WORDS, k=source.randint(4, 12)))
    return f"{text.capitalize()}." if source.random() < 0.5 else f"{text}!!!"


class FaultServer(ThreadingHTTPServer):
    """Serves ``/v1/chat/completions``, ``/v1/responses`` and ``/v1/models`` in a thread, as a context manager;
    ``/seen`` tells another process what came.

    Args:
        faults: probability of each fault, by its name in ``FAULTS``; together at most 1. It may be changed while
            the server runs.
        seed: seed of the faults.
        delay: seconds before each answer.
        n: "obey" gives so many choices, "ignore" gives one, "refuse" answers 400 where n is above 1.
        key: the bearer token to demand; None takes any. A wrong one is quoted in the error, as some servers do.
        models: the names that are known; anything else is answered 404.
        reply: ``(messages, number) -> str``; the number is the choice's place plus the request's ``seed``.
        retry_after: seconds that a 429 asks to wait.
        hang: seconds after which a hanging connection is closed.
        pause: seconds between the drops of a trickle.
        huge_bytes: size of a huge body.
        context: characters of all messages together that are answered; more is "context_length_exceeded".
        usage: whether answers say how many tokens they took (a token is four characters here).
        port: 0 takes a free one.

    Attributes:
        url: the base URL for a client, ending in ``/v1``.
        requests: (path, Authorization header, body) of each POST, in the order of arrival.
        outcomes: how many POST requests met which fault; those that met none are counted as "ok".
        chains: for each different body the faults that its requests met, in turn, "ok" for none.
        under_way: POST requests that have arrived and are not done.
        most_at_once: the largest number of them at one time.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self,
        faults: Mapping[str, float] | None = None,
        *,
        seed: int = 0,
        delay: float = 0.0,
        n: str = "obey",
        key: str | None = None,
        models: Sequence[str] = ("tiny",),
        reply: Reply = default_reply,
        retry_after: float = 1.0,
        hang: float = 60.0,
        pause: float = 0.05,
        huge_bytes: int = 80_000_000,
        context: int = 100_000,
        usage: bool = True,
        port: int = 0,
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.faults = dict(faults or {})
        known = FAULTS | ODDITIES
        if unknown := self.faults.keys() - known.keys():
            raise ValueError(f"unknown faults {sorted(unknown)}; known are {', '.join(known)}")
        self.seed = seed
        self.delay = delay
        self.n = n
        self.key = key
        self.models = tuple(models)
        self.reply = reply
        self.retry_after = retry_after
        self.hang = hang
        self.pause = pause
        self.huge_bytes = huge_bytes
        self.context = context
        self.usage = usage
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.requests: list[tuple[str, str | None, dict[str, Any]]] = []
        self.outcomes: Counter[str] = Counter()
        self.most_at_once = 0
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.under_way = 0
        self.chains: dict[str, list[str]] = {}
        self._served: Counter[str] = Counter()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> FaultServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()
        self._thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that hang up are the point."""

    def arrive(self, path: str, authorization: str | None, body: dict[str, Any]) -> str:
        """Note a request and settle which fault it meets, "" for none."""
        text = json.dumps(body, sort_keys=True)
        with self.lock:
            self.requests.append((path, authorization, body))
            self.under_way += 1
            self.most_at_once = max(self.most_at_once, self.under_way)
            chain = self.chains.setdefault(text, [])
            uniform = random.Random(f"{self.seed}\n{text}\n{len(chain)}").random()
            fault = ""
            for name, probability in self.faults.items():
                if uniform < probability:
                    fault = name
                    break
                uniform -= probability
            chain.append(fault or "ok")
            self.outcomes[fault or "ok"] += 1
        return fault

    def leave(self) -> None:
        """Note that a request is done."""
        with self.lock:
            self.under_way -= 1

    def texts(self, messages: list[dict[str, Any]], body: Mapping[str, Any], n: int) -> list[str]:
        """Write the replies of one request."""
        first = body.get("seed")
        if first is None:
            text = json.dumps(messages, sort_keys=True)
            with self.lock:
                first = self._served[text]
                self._served[text] += n
        return [self.reply(messages, first + place) for place in range(n)]


class _Handler(BaseHTTPRequestHandler):
    server: FaultServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    stale = False

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            rows = [{"id": name, "object": "model", "created": 0, "owned_by": "nobody"} for name in self.server.models]
            self._send(200, {"object": "list", "data": rows})
        elif self.path == "/seen":
            with self.server.lock:
                seen = {"chains": list(self.server.chains.values()), "most_at_once": self.server.most_at_once}
            self._send(200, seen)
        else:
            self._send_bytes(404, b"<html>not here</html>", "text/html")

    def do_POST(self) -> None:
        server = self.server
        if self.stale:
            self.close_connection = True
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = server.arrive(self.path, self.headers.get("Authorization"), body)
        try:
            if server.delay:
                time.sleep(server.delay)
            self._answer(body, fault)
        finally:
            server.leave()

    def _answer(self, body: dict[str, Any], fault: str) -> None:
        server = self.server
        key = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        n = body.get("n") or 1
        chat = self.path == "/v1/chat/completions"
        messages = body.get("messages") if chat else body.get("input")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if self.path not in ("/v1/chat/completions", "/v1/responses"):
            self._send_bytes(404, b"<html>not here</html>", "text/html")
        elif server.key is not None and key != server.key:
            self._fail(401, f"Incorrect API key provided: {key}.", "invalid_api_key")
        elif fault and self._misbehave(fault):
            pass
        elif body.get("model") not in server.models:
            self._fail(404, f"The model `{body.get('model')}` does not exist.", "model_not_found")
        elif not messages:
            self._fail(400, "messages must not be empty", "invalid_value")
        elif len(json.dumps(messages)) > server.context:
            self._fail(400, f"This model's maximum context length is {server.context}.", "context_length_exceeded")
        elif n > 1 and server.n == "refuse":
            self._fail(400, "Only one completion choice is allowed", None)
        elif body.get("stream"):
            self._stream(server.texts(messages, body, 1)[0], body)
        else:
            texts = server.texts(messages, body, n if server.n == "obey" else 1)
            answer = _chat_answer if chat else _response_answer
            value = answer(body, texts, fault)
            if server.usage:
                tokens = len(json.dumps(messages)) // 4, sum(len(text) // 4 for text in texts)
                names = ("prompt_tokens", "completion_tokens") if chat else ("input_tokens", "output_tokens")
                value["usage"] = dict(zip(names, tokens, strict=True)) | {"total_tokens": sum(tokens)}
            self._deliver(value, fault)

    def _misbehave(self, fault: str) -> bool:
        """Answer with a fault that needs no reply; False for those that spoil a reply."""
        server = self.server
        if fault == "429":
            self._fail(429, "slow down", "rate_limit_exceeded", {"Retry-After": f"{server.retry_after:g}"})
        elif fault == "500":
            self._fail(500, "out of order", "server_error")
        elif fault == "refused_content":
            self._fail(400, "The response was filtered by the content management policy.", "content_filter")
        elif fault == "hang":
            server.released.wait(server.hang)
            self.close_connection = True
        elif fault == "reset":
            self.close_connection = True
        elif fault == "content_type":
            self._send_bytes(200, b"<!DOCTYPE html><title>Welcome</title>", "text/html")
        elif fault == "deep":
            self._send_bytes(200, b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "application/json")
        elif fault == "many":
            self._send_bytes(200, b'{"choices": [' + b"[]," * 600_000 + b"1]}", "application/json")
        elif fault == "quotes_key":
            key = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            message = f"Incorrect API key provided: {key}; that is {key[: len(key) // 2]}... or ...{key[-10:]}"
            self._fail(401, message, "invalid_api_key", {"x-key": key})
        elif fault == "invalid_json":
            self._send_bytes(200, b'{"choices": [{"message": {"content": "half', "application/json")
        else:
            return False
        return True

    def _deliver(self, value: dict[str, Any], fault: str) -> None:
        server = self.server
        data = json.dumps(value).encode()
        if fault == "bad_usage":
            usage = (
                f'"prompt_tokens": NaN, "completion_tokens": -5, "total_tokens": 1e400, "more": {{"d": {"9" * 400}}}'
            )
            data = json.dumps({**value, "usage": {}}).replace('"usage": {}', f'"usage": {{{usage}}}').encode()
        self.stale = fault == "stale"
        if fault == "cut":
            self._head(200, "application/json", len(data))
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif fault == "trickle":
            self._head(200, "application/json", len(data) + 1_000_000)
            self.close_connection = True
            started = time.monotonic()
            while time.monotonic() - started < server.hang and not server.released.wait(server.pause):
                self.wfile.write(b" ")
        elif fault == "huge":
            self._head(200, "application/json", len(data) + server.huge_bytes)
            self.close_connection = True
            for _ in range(server.huge_bytes // 1_000_000):
                self.wfile.write(b" " * 1_000_000)
            self.wfile.write(data)
        elif fault == "utf8_header":
            # http.server writes Latin-1
            self._send_bytes(200, data, "application/json", {"x-model-name": "模型".encode().decode("latin-1")})
        elif fault == "spoofed":
            self._head(200, "application/json", len(data), {**SPOOFED, "x-twice": "1\r\nx-twice: 2"})
            self.wfile.write(data)
        else:
            self._send_bytes(200, data, "application/json")

    def _stream(self, text: str, body: dict[str, Any]) -> None:
        """Send one reply word by word as server-sent events."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        pieces: list[tuple[dict[str, str], str | None]] = [({"role": "assistant", "content": ""}, None)]
        pieces += [({"content": word + " "}, None) for word in text.split()] + [({}, "stop")]
        for delta, reason in pieces:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            chunk = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": body["model"]}
            self.wfile.write(f"data: {json.dumps(chunk | {'choices': [choice]})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def _fail(self, status: int, message: str, code: str | None, headers: Mapping[str, str] | None = None) -> None:
        error = {"message": message, "type": "error", "param": None, "code": code}
        self._send(status, {"error": error}, headers)

    def _send(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self._send_bytes(status, json.dumps(value).encode(), "application/json", headers)

    def _send_bytes(self, status: int, data: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        self._head(status, kind, len(data), headers)
        self.wfile.write(data)

    def _head(self, status: int, kind: str, length: int, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()


def _chat_answer(body: dict[str, Any], texts: list[str], fault: str) -> dict[str, Any]:
    choices = [
        {"index": place, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        for place, text in enumerate(texts)
    ]
    for choice in choices:
        message: dict[str, Any] = choice["message"]  # pyright: ignore[reportAssignmentType]
        if fault == "non_string":
            message["content"] = [{"type": "image_url", "image_url": {"url": "data:,"}}]
        elif fault == "tool_calls":
            function = {"name": "search", "arguments": "{}"}
            message |= {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}
            choice["finish_reason"] = "tool_calls"
        elif fault == "blank":
            message["content"] = " \n\t "
        elif fault == "content_filter":
            message["content"] = ""
            choice["finish_reason"] = "content_filter"
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [] if fault == "empty_choices" else choices,
    }


def _response_answer(body: dict[str, Any], texts: list[str], fault: str) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "output_text", "text": texts[0], "annotations": []}
    item: dict[str, Any] = {"id": "m", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    answer: dict[str, Any] = {
        "id": "resp-1",
        "object": "response",
        "created_at": 0,
        "model": body["model"],
        "status": "completed",
        "output": [] if fault == "empty_choices" else [item],
        "parallel_tool_calls": False,
        "tool_choice": "auto",
        "tools": [],
    }
    if fault == "non_string":
        part["text"] = [texts[0]]
    elif fault == "tool_calls":
        answer["output"] = [{"id": "f", "type": "function_call", "call_id": "1", "name": "search", "arguments": "{}"}]
    elif fault == "blank":
        part["text"] = " \n\t "
    elif fault == "content_filter":
        part["text"] = ""
        answer |= {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}}
    return answer


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--n", choices=("obey", "ignore", "refuse"), default="obey")
    parser.add_argument(
        "--fault", action="append", default=[], metavar="NAME=PROBABILITY", help=", ".join(FAULTS | ODDITIES)
    )
    arguments = parser.parse_args()
    faults = {name: float(value) for name, _, value in (fault.partition("=") for fault in arguments.fault)}
    options = {"seed": arguments.seed, "delay": arguments.delay, "n": arguments.n, "port": arguments.port}
    with FaultServer(faults, **options) as server:
        print(f"serving {', '.join(server.models)} at {server.url}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print(dict(server.outcomes))


if __name__ == "__main__":
    main()
