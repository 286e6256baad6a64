"""A flow that prefers sentences to mumbling, the proxy before an upstream, and ways to ask it."""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
import time
from typing import Any

import httpx2
import openai
from support.chat_server import reply, running

import pfm
from pfm.serve import ServeConfig, create_app

KEY = "sk-of-the-client-1234567890"
MESSAGES: Any = [{"role": "user", "content": "Question 1?"}]


def fitted(shuffled: int | None = None) -> pfm.PreferenceFlow:
    """Fit a flow that prefers sentences to mumbling; or, with the seed of a shuffle of the labels, nothing."""
    source = random.Random(0)
    rows = []
    for number in range(180):
        good = source.random() < 0.85  # people err
        sides = [f"Question {number // 3}?: {reply(kind, source)}" for kind in (good, not good)]
        rows.append({"prompt": f"Question {number // 3}?", "chosen": sides[0], "rejected": sides[1]})
    encoded = pfm.PreferencePairs.from_rows(rows).encode(pfm.encoders.SurfaceEncoder(), progress=False)
    if shuffled is not None:
        encoded = encoded.shuffle_labels(seed=shuffled)
    return pfm.PreferenceFlow.fit(encoded, pfm.FlowConfig(residual=False), progress=False)


@contextlib.contextmanager
def proxy(refiner: pfm.Refiner, upstream: str, **settings: Any):
    with running(create_app(refiner, ServeConfig(upstream=upstream, **settings))) as url:
        yield url


def client(url: str, key: str = KEY, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, **options)


def ask(url: str, model: str = "heeds-n", **options: Any) -> Any:
    """Ask by the openai client; a stream comes as the list of its chunks."""
    with client(url) as asking:
        answer = asking.chat.completions.create(model=model, messages=options.pop("messages", MESSAGES), **options)
        return list(answer) if options.get("stream") else answer


def post(url: str, body: Any, path: str = "/chat/completions", **headers: str) -> httpx2.Response:
    """Ask by hand, to see the answer's bytes and headers."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with httpx2.Client(timeout=60) as asking:
        return asking.post(
            url + path,
            content=content,
            headers={"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}},
        )


def plain(**more: Any) -> dict[str, Any]:
    return {"model": "heeds-n", "messages": MESSAGES, **more}


def metrics(url: str) -> dict[str, float]:
    text = httpx2.get(url.removesuffix("/v1") + "/metrics").text
    return {name: float(value) for name, value in re.findall(r"^([a-z_]+(?:{.*})?) (\S+)$", text, re.MULTILINE)}


def eventually(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class TroubledEncoder:
    """Fails for prompts with the word trouble, and is slow where asked to be."""

    dimension = 28

    def __init__(self, seconds: float = 0.0) -> None:
        self.encoder = pfm.encoders.SurfaceEncoder()
        self.seconds = seconds
        self.prompts: list[str] = []
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()

    def encode(self, texts, *, progress=False):
        self.batches.append(texts)
        self.gate.wait(60)
        time.sleep(self.seconds)
        return self.encoder.encode(texts)

    def encode_prompts(self, texts, *, progress=False):
        self.prompts += texts
        if any("trouble" in text for text in texts):
            raise pfm.EncodingError(f"cannot encode {texts}")
        return self.encoder.encode(texts)

    def describe(self):
        return self.encoder.describe()
