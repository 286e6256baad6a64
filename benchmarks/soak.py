"""Load ``pfm serve`` on loopback with everything that goes wrong at once: ``make soak``.

The upstream (``tests/support/fault_server.py``) fails in a fifth of its calls. Clients ask, stream, pass requests
through, leave in the middle, and read nothing of the answer; the proxy is killed twice (SIGKILL) and started again.
Checked is that every request that its client waited for ends in an answer to its own question, that memory does not
grow after a warm-up, and that at the end no place, no held body and no file descriptor is left over.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx2

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))
from support.fault_server import default_reply, mixed_faults  # noqa: E402  # pyright: ignore[reportMissingImports]

KINDS = {"ask": 0.62, "stream": 0.12, "pass": 0.1, "leave": 0.1, "stall": 0.06}
REQUEST_SECONDS = 120.0  # in which a client must have its answer, restarts of the proxy included
SEND_SECONDS = 3.0


class Proxy:
    """The process of ``pfm serve``, which can be killed and started again on the same port."""

    def __init__(self, flow: str, upstream: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [Path(sys.executable).with_name("pfm"), "serve", flow, "--upstream", upstream, "--port", self.port]
        limits = ["-n", 4, "--timeout", 5, "--send-timeout", SEND_SECONDS, "--read-timeout", 5, "--quiet"]
        self.command = [str(part) for part in [*command, *limits]]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115, it lasts as long as this does

    async def start(self) -> None:
        """Start the process and wait until it answers."""
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=self.log)
        async with httpx2.AsyncClient() as client:
            while True:
                with contextlib.suppress(httpx2.RequestError):
                    if (await client.get(self.url + "/healthz")).status_code == 200:
                        return
                if self.process.poll() is not None:
                    self.log.seek(0)
                    raise RuntimeError(f"pfm serve ended: {self.log.read()[-2000:].decode(errors='replace')}")
                await asyncio.sleep(0.1)

    def kill(self) -> None:
        """End the process with no chance to tidy up."""
        self.process.kill()
        self.process.wait()

    def memory(self) -> float:
        """Return the resident memory in MiB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def descriptors(self) -> int:
        """Return the number of open files and sockets."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


class Load:
    """Keeps clients busy, each with one request after the other."""

    def __init__(self, url: str, seed: int) -> None:
        self.url = url
        self.seed = seed
        self.ended = False
        self.counts: Counter[str] = Counter()
        self.lost: list[str] = []
        self.seconds: list[float] = []

    async def client(self, number: int) -> None:
        """Send requests until the load ends."""
        source = random.Random(f"{self.seed} {number}")
        turn = 0
        async with httpx2.AsyncClient(timeout=REQUEST_SECONDS) as http:
            while not self.ended:
                (kind,) = source.choices(list(KINDS), list(KINDS.values()))
                turn += 1
                body = {"model": "tiny", "messages": [{"role": "user", "content": f"Question {turn} of {number}?"}]}
                if kind == "leave":
                    with contextlib.suppress(TimeoutError, httpx2.RequestError):
                        async with asyncio.timeout(source.uniform(0.0, 0.3)):
                            await http.post(f"{self.url}/v1/chat/completions", json=body)
                elif kind == "stall":
                    await self._stall(body)
                else:
                    await self._wait_for_answer(http, kind, body)
                self.counts[kind] += 1

    async def _stall(self, body: dict[str, Any]) -> None:
        """Ask for many answers on one connection and read none of them."""
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", int(self.url.rsplit(":", 1)[1]), limit=2**10)
            content = json.dumps(body).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n"
            writer.write(head.encode() + content)
            await asyncio.sleep(1.5 * SEND_SECONDS)
            writer.transport.abort()

    async def _wait_for_answer(self, http: httpx2.AsyncClient, kind: str, body: dict[str, Any]) -> None:
        """Ask again, as clients do, until there is an answer; note a request that never has one."""
        more = {"stream": {"stream": True}, "pass": {"pfm": False}}.get(kind, {})
        started = time.monotonic()
        problem = ""
        while time.monotonic() - started < REQUEST_SECONDS:
            try:
                answer = await http.post(f"{self.url}/v1/chat/completions", json={**body, **more})
                problem = f"status {answer.status_code}"
                if answer.status_code == 200 and (text := _text(answer)) is not None:
                    if text not in {default_reply(body["messages"], k) for k in range(400)}:
                        self.lost.append(f"an answer to another question: {text!r}")
                    self.seconds.append(time.monotonic() - started)
                    return
            except httpx2.RequestError as error:
                problem = type(error).__name__
            self.counts[f"repeated: {problem}"] += 1
            await asyncio.sleep(0.2)
        self.lost.append(f"{kind}: {problem}")


def _text(answer: httpx2.Response) -> str | None:
    """Return the content of a completion, whole or streamed; None where it is none or has no text."""
    try:
        if "event-stream" not in answer.headers["content-type"]:
            text = answer.json()["choices"][0]["message"]["content"]
        else:
            chunks = [json.loads(part) for part in answer.text.split("data: ")[1:-1]]
            text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    except (ValueError, LookupError, TypeError):
        return None
    return text or None


async def soak(arguments: argparse.Namespace, proxy: Proxy) -> tuple[dict[str, Any], list[str]]:
    """Run the load; return figures, and what is wrong."""
    await proxy.start()
    idle_descriptors = proxy.descriptors()
    load = Load(proxy.url, arguments.seed)
    clients = [asyncio.create_task(load.client(number)) for number in range(arguments.clients)]
    started = time.monotonic()
    samples: list[tuple[float, float]] = []
    kills = [0.12, 0.24]
    while (share := (time.monotonic() - started) / arguments.seconds) < 1:
        if kills and share >= kills[0]:
            kills.pop(0)
            killed = time.monotonic()
            proxy.kill()
            await proxy.start()
            started += time.monotonic() - killed  # loading modules takes long on a busy machine, and is no load
            samples.clear()
        samples.append((share, proxy.memory()))
        await asyncio.sleep(0.5)
    load.ended = True
    await asyncio.gather(*clients)
    async with httpx2.AsyncClient() as client:
        deadline = time.monotonic() + 30
        while True:  # until idle connections to the upstream have ended too
            health = (await client.get(proxy.url + "/healthz")).json()
            if (health["active"] == health["waiting"] == 0 and proxy.descriptors() <= idle_descriptors + 3) or (
                time.monotonic() > deadline
            ):
                break
            await asyncio.sleep(0.5)
        text = (await client.get(proxy.url + "/metrics")).text
    held = float(text.partition("\npfm_held_bytes ")[2].split()[0])
    descriptors = proxy.descriptors()
    warm = statistics.median(memory for share, memory in samples if 0.45 <= share < 0.6)
    last = statistics.median(memory for share, memory in samples if share >= 0.85)
    started = time.monotonic()
    proxy.process.send_signal(signal.SIGTERM)
    code = proxy.process.wait(60)
    figures = {
        "requests": sum(load.counts[kind] for kind in KINDS),
        **{f"  {kind}": load.counts[kind] for kind in KINDS},
        **{f"  {name}": count for name, count in sorted(load.counts.items()) if name.startswith("repeated")},
        "lost": len(load.lost),
        "median seconds of an answer": round(statistics.median(load.seconds), 2),
        "99th percentile": round(statistics.quantiles(load.seconds, n=100)[-1], 2),
        "MiB after warm-up": round(warm, 1),
        "MiB at the end": round(last, 1),
        "places at the end": health["active"] + health["waiting"],
        "held bytes at the end": held,
        "descriptors idle before": idle_descriptors,
        "descriptors idle after": descriptors,
        "seconds to shut down": round(time.monotonic() - started, 1),
        "bytes of log": proxy.log.seek(0, os.SEEK_END),
    }
    wrong = load.lost[:5]
    wrong += [f"memory grew from {warm:.0f} to {last:.0f} MiB"] * (last > 1.1 * warm)
    wrong += [f"places are still taken: {health}"] * (health["active"] + health["waiting"] > 0)
    wrong += [f"{held:g} bytes are still held"] * (held > 0)
    wrong += [f"{descriptors} descriptors are open, {idle_descriptors} before"] * (descriptors > idle_descriptors + 3)
    wrong += [f"pfm serve ended with code {code}"] * (code != 0)
    return figures, wrong


def main() -> None:
    """Run it, print the figures, and exit with code 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=420.0, help="of load, at most 540")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--faults", type=float, default=0.2, help="share of the upstream's calls that fail")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not 20 <= arguments.seconds <= 540:
        parser.error(f"--seconds must be from 20 to 540, got {arguments.seconds:g}")

    import pfm

    faults = mixed_faults(arguments.faults)
    options = [f"--fault={name}={probability}" for name, probability in faults.items()]
    server = subprocess.Popen(
        [sys.executable, TESTS / "support" / "fault_server.py", "--port=0", "--n=ignore", "--delay=0.02", *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        pairs = pfm.PreferencePairs.from_jsonl(str(files("pfm") / "assets" / "preferences.jsonl"))
        encoded = pairs.encode(pfm.encoders.encoder_from_name("surface"), progress=False)
        pfm.PreferenceFlow.fit(encoded, pfm.FlowConfig(residual=False), progress=False).save_pretrained(folder)
        assert server.stdout is not None
        proxy = Proxy(folder, server.stdout.readline().split()[-1])
        try:
            figures, wrong = asyncio.run(soak(arguments, proxy))
        finally:
            if hasattr(proxy, "process"):
                proxy.kill()
            server.kill()
    for name, value in figures.items():
        print(f"{name:<40}{value:>12}")
    for problem in wrong:
        print(f"WRONG: {problem}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
