"""What ``pfm serve`` adds to the time of its upstream: ``python -m benchmarks.serving``.

Upstream, proxy and client are three processes on this machine. The upstream hands out the drafts of the example
preferences after a fixed delay; requests go to it directly and through the proxy in turn. The flow is fitted on the
example preferences with ``minilm+surface``; candidates are encoded anew each time, prompts once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request


def drafts() -> dict[str, list[str]]:
    """Read the drafts of each prompt of the example preferences."""
    found: dict[str, list[str]] = {}
    for line in (files("pfm") / "assets" / "preferences.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        known = found.setdefault(row["prompt"], [])
        known += [text for text in (row["chosen"], row["rejected"]) if text not in known]
    return found


def upstream(delay: float, words: int, connection: Any) -> None:
    """Serve chat completions of drafts, each repeated up to a length and changed a little: no cache knows it."""
    app, known, source = FastAPI(), drafts(), random.Random(0)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> dict[str, Any]:
        body = await request.json()
        await asyncio.sleep(delay)
        texts = source.choices(known[body["messages"][-1]["content"]], k=body.get("n") or 1)
        texts = [" ".join([text] * max(1, -(-words // len(text.split())))) for text in texts]
        choices = [
            {"index": k, "message": {"role": "assistant", "content": f"{text} ({source.random()})"}}
            for k, text in enumerate(texts)
        ]
        return {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": choices}

    config = uvicorn.Config(app, port=0, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    listening = config.bind_socket()
    listening.setsockopt(6, 1, 1)  # TCP_NODELAY, which asyncio leaves unset on this socket
    connection.send(listening.getsockname()[1])
    server.run(sockets=[listening])


def processor_seconds(pid: int) -> float:
    """Return the processor time of all threads of a process so far; NaN where the system does not tell (not Linux)."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
    except OSError:
        return math.nan


def one_by_one(direct: Any, proxied: Any, requests: int, n: int, pid: int) -> dict[str, float]:
    """Ask directly and through the proxy, process ``pid``, in turn, over 8 prompts that have been asked before."""
    prompts = list(drafts())[:8]

    def timed(client: Any, number: int, **options: Any) -> tuple[float, Any]:
        messages = [{"role": "user", "content": prompts[number % 8]}]
        started = time.perf_counter()
        answer = client.chat.completions.create(model="m", messages=messages, **options)
        return time.perf_counter() - started, answer

    for number in range(8):
        timed(direct, number, n=n)
        timed(proxied, number)
    added, own, encoder, flow, processor = [], [], [], [], []
    for number in range(requests):
        alone, _ = timed(direct, number, n=n)
        before = processor_seconds(pid)
        whole, answer = timed(proxied, number)
        processor.append(processor_seconds(pid) - before)
        seconds = answer.pfm["seconds"]
        added.append(whole - alone)
        own.append(whole - alone - seconds["encoder"])
        encoder.append(seconds["encoder"])
        flow.append(seconds["flow"])
    return {
        "added": statistics.median(added),
        "encoder": statistics.median(encoder),
        "added beyond the encoder": statistics.median(own),
        "  its 90th percentile": statistics.quantiles(own, n=10)[-1],
        "  flow and choice": statistics.median(flow),
        "processor time of the proxy": statistics.median(processor),
    }


async def at_once(url: str, clients: int, each: int) -> dict[str, float]:
    """Ask from many clients at once."""
    import openai

    prompts = list(drafts())[:8]
    failed = 0
    taken = []

    async def one(number: int) -> None:
        nonlocal failed
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:
            for turn in range(each):
                started = time.perf_counter()
                try:
                    answer: Any = await client.chat.completions.create(
                        model="m", messages=[{"role": "user", "content": prompts[(number + turn) % 8]}]
                    )
                    failed += not answer.pfm["refined"]
                except openai.APIError:
                    failed += 1
                taken.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(clients)))
    seconds = time.perf_counter() - started
    return {"requests": clients * each, "failed": failed, "requests a second": clients * each / seconds} | {
        "median seconds": statistics.median(taken)
    }


def main() -> None:
    """Measure, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("-n", type=int, default=8)
    parser.add_argument("--delay", type=float, default=0.05, help="seconds that the upstream takes")
    parser.add_argument("--encoder", default="minilm+surface")
    parser.add_argument("--words", type=int, default=0, help="repeat a draft until it has so many; 200 are 256 tokens")
    arguments = parser.parse_args()

    import openai

    import pfm

    receiving, sending = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=upstream, args=(arguments.delay, arguments.words, sending), daemon=True
    )
    server.start()
    address = f"http://127.0.0.1:{receiving.recv()}/v1"
    with tempfile.TemporaryDirectory() as folder:
        pairs = pfm.PreferencePairs.from_jsonl(str(files("pfm") / "assets" / "preferences.jsonl"))
        encoded = pairs.encode(pfm.encoders.encoder_from_name(arguments.encoder), progress=False)
        pfm.PreferenceFlow.fit(encoded, pfm.FlowConfig(residual=False), progress=False).save_pretrained(folder)
        command = [Path(sys.executable).with_name("pfm"), "serve", folder, "--upstream", address, "--quiet"]
        proxy = subprocess.Popen(
            [str(part) for part in [*command, "--port", 0, "-n", arguments.n]],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert proxy.stdout is not None
            url = proxy.stdout.readline().split()[-1]
            with (
                openai.OpenAI(base_url=address, api_key="none") as direct,
                openai.OpenAI(base_url=url, api_key="none") as proxied,
            ):
                found = one_by_one(direct, proxied, arguments.requests, arguments.n, proxy.pid)
            print(f"one client, {arguments.requests} requests of {arguments.n} candidates, milliseconds, medians:")
            for name, seconds in found.items():
                print(f"  {name:<28}{seconds * 1e3:8.1f}")
            print(f"{arguments.clients} clients at once:")
            for name, value in asyncio.run(at_once(url, arguments.clients, 2)).items():
                print(f"  {name:<28}{value:8.1f}")
        finally:
            proxy.terminate()
            proxy.wait()
            server.terminate()


if __name__ == "__main__":
    main()
