"""A small OpenAI-compatible server for tests, on a real socket, and a way to run any application on one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

WORDS = ["stone", "river", "lamp", "garden", "wind", "paper", "bridge", "cloud"]


def reply(good: bool, source: random.Random) -> str:
    """Write a reply: a good one is a sentence, a bad one shouts or mumbles."""
    text = " ".join(source.choices(WORDS, k=source.randint(4, 12)))
    return f"{text.capitalize()}." if good else text + source.choice(["!!!", "??", " lol"])


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """Serve an application in a thread, and give its base URL, which ends in /v1."""
    # With the protocol named, asyncio sends small pieces at once (TCP_NODELAY).
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


class ChatServer:
    """Answers chat requests with good and bad replies; the model's name says how it misbehaves.

    ``heeds-n`` gives n choices, ``one`` always one, ``refuses-n`` status 422 for n; ``status-NNN`` fails with
    that status; ``hangs`` never answers, ``flaky`` fails every second call, ``hangs-later`` answers the first call
    of a conversation only; ``html`` and ``empty`` give no completion; ``calls`` gives a tool call, ``blank`` white
    space; ``slow`` takes a fifth of a second.

    Attributes:
        received: headers and body of each chat request.
        gone: requests whose client left before they were answered.
    """

    def __init__(self) -> None:
        self.received: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.gone = 0
        self.app = FastAPI()
        self.app.post("/v1/chat/completions", response_model=None)(self.chat)
        self.app.api_route("/v1/{path:path}", methods=["GET", "POST", "DELETE"], response_model=None)(self.other)

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """The bodies of the chat requests."""
        return [body for _, body in self.received]

    async def chat(self, request: Request) -> Response:
        """Answer a chat request."""
        body = json.loads(await request.body())
        self.received.append((dict(request.headers), body))
        model, place = body["model"], len(self.received)
        if model in ("hangs", "trickles") or (model == "hangs-later" and place > 1):
            return await self._hang(request)
        if model == "slow":
            await asyncio.sleep(0.2)
        if model.startswith("status-") or (model == "flaky" and place % 2 == 0):
            status = 500 if model == "flaky" else int(model.removeprefix("status-"))
            error = {"error": {"message": f"no luck ({status})", "type": "server", "param": None, "code": "luck"}}
            return JSONResponse(error, status, headers={"Retry-After": "7", "x-request-id": f"request-{place}"})
        if model == "html":
            return Response("<p>Hello</p>", media_type="text/html")
        if model == "empty":
            return JSONResponse({"id": "x", "object": "chat.completion", "choices": []})
        if "n" in body and model == "refuses-n":
            return JSONResponse({"detail": "Unexpected fields in the request: {'n'}"}, 422)
        if unknown := {"pfm", "x-pfm"} & body.keys():
            return JSONResponse({"detail": f"Unexpected fields: {unknown}"}, 422)
        n = 1 if model in ("one", "flaky") else body.get("n") or 1
        return self._answer(body, n, place)

    def _answer(self, body: dict[str, Any], n: int, place: int) -> Response:
        asked = body["messages"][-1]["content"]
        source = random.Random(json.dumps([body["messages"], body.get("seed"), place]))
        texts = [f"{asked if isinstance(asked, str) else 'picture'}: {reply(k % 3 == 1, source)}" for k in range(n)]
        whole = {
            "id": f"chatcmpl-{place}",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": f"{body['model']}-2026",
            "system_fingerprint": "fp_7",
            "choices": [self._choice(index, text, body["model"]) for index, text in enumerate(texts)],
            "usage": {
                "prompt_tokens": 10,
                "completion_tokens": 5 * n,
                "total_tokens": 10 + 5 * n,
                "completion_tokens_details": {"reasoning_tokens": n},
            },
            "of_this_server": {"kept": True},
        }
        headers = {"x-request-id": f"request-{place}", "set-cookie": f"session={place}; Path=/"}
        if not body.get("stream"):
            return JSONResponse(whole, headers=headers)

        async def events():
            for word in texts[0].split(" "):
                delta = {"index": 0, "delta": {"content": word + " "}, "finish_reason": None}
                chunk = {**whole, "object": "chat.completion.chunk", "choices": [delta], "usage": None}
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream", headers=headers)

    @staticmethod
    def _choice(index: int, text: str, model: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": " \n" if model == "blank" else text}
        if model == "calls":
            call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
            message |= {"content": None, "tool_calls": [call]}
        finish_reason = "tool_calls" if model == "calls" else "stop"
        return {"index": index, "message": message, "finish_reason": finish_reason, "of_this_choice": index}

    async def _hang(self, request: Request) -> Response:
        if (await request.receive())["type"] == "http.disconnect":
            self.gone += 1
        return Response(status_code=499)

    async def other(self, request: Request, path: str) -> Response:
        """Echo what came."""
        content = await request.body()
        if path == "models":
            return JSONResponse({"object": "list", "data": [{"id": "heeds-n", "object": "model", "owned_by": "tests"}]})
        if path == "binary":
            return Response(bytes(range(256)), media_type="application/octet-stream")
        echo = {
            "method": request.method,
            "path": path,
            "query": request.url.query,
            "body": content.decode(),
            "headers": dict(request.headers),
        }
        return JSONResponse(echo, 404 if path == "missing" else 200)
