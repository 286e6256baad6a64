"""The chat page in a real browser: ask, rate, edit, choose; what it keeps can be read by a fit."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.chat_server import ChatServer, running
from support.proxy import fitted

import pfm
from pfm.serve import ServeConfig, create_app

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<img src=x onerror=\"document.title='broken in'\">"


class Browser:
    """A page of Chromium, driven by its debugging protocol."""

    def __init__(self, folder: Path, address: str) -> None:
        connect = pytest.importorskip("websockets.sync.client", reason="driving a browser needs websockets").connect
        assert CHROMIUM is not None
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        self.process = subprocess.Popen(
            [CHROMIUM, *options, f"--user-data-dir={folder}", "--remote-debugging-port=0", "--window-size=900,900",
             address],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            port = wait(lambda: folder.joinpath("DevToolsActivePort").read_text().split()[0])
            import httpx2

            def page() -> str:
                pages = httpx2.get(f"http://127.0.0.1:{port}/json", trust_env=False).json()
                return next(one["webSocketDebuggerUrl"] for one in pages if one["url"] == address)

            self.socket = connect(wait(page), max_size=None, proxy=None).__enter__()
        except BaseException:
            self.close()
            raise

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.socket.send(json.dumps({"id": 1, "method": method, "params": parameters}))
        while "id" not in (answer := json.loads(self.socket.recv(timeout=60))):
            pass
        return answer["result"]

    def run(self, code: str) -> Any:
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def wait(look: Callable[[], Any], seconds: float = 60) -> Any:
    """Look until there is something."""
    end = time.monotonic() + seconds
    while True:
        try:
            if found := look():
                return found
        except (OSError, IndexError, StopIteration, ValueError):
            pass
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
def test_thumbs_edits_and_choices_become_rows(tmp_path):
    chat, kept, asked = ChatServer(), tmp_path / "feedback.jsonl", f"Stones? {HOSTILE}"
    refiner = pfm.wrap(None, fitted(), encoder=pfm.encoders.SurfaceEncoder(), n=4, margin=0.0)

    def rows() -> list[dict[str, Any]]:
        return [json.loads(line) for line in kept.read_text().splitlines()]

    with running(chat.app) as upstream:
        config = ServeConfig(upstream=upstream, model="heeds-n", feedback=kept)
        with running(create_app(refiner, config)) as url:
            browser = Browser(tmp_path / "browser", url.replace("/v1", "/chat"))
            try:
                button = "[...document.querySelectorAll('button')].findLast((one) => one.textContent == {!r})"
                wait(lambda: browser.run("document.querySelector('#model option') !== null"))
                browser.run(f"$('text').value = {json.dumps(asked)}; $('ask').requestSubmit()")
                wait(lambda: browser.run("document.querySelectorAll('.assistant .tools').length == 1"))
                said = browser.run("document.querySelector('.assistant .said').textContent")
                assert browser.run("document.querySelector('.user .said').textContent") == asked
                browser.run(button.format("Good") + ".click()")
                wait(lambda: len(rows()) == 1)
                browser.run(button.format("Compare") + ".click()")
                browser.picture(tmp_path / "pair.png")
                browser.run("document.querySelectorAll('.pair button')[0].click()")
                wait(lambda: len(rows()) == 2)
                browser.run(button.format("Edit") + ".click()")
                browser.run("document.querySelector('.editor').value = 'A better answer.'")
                browser.run(button.format("Keep the edit") + ".click()")
                wait(lambda: len(rows()) == 3)
                assert browser.run("document.title") == "pfm chat"
                browser.run("$('text').value = 'And rivers?'; $('ask').requestSubmit()")
                wait(lambda: browser.run("document.querySelectorAll('.assistant .tools').length == 2"))
                browser.picture(tmp_path / "end.png")
            finally:
                browser.close()
    liked, chosen, edited = rows()
    assert (liked["completion"], liked["label"]) == (said, True)
    assert said in (chosen["chosen"], chosen["rejected"])
    assert edited["chosen"] == "A better answer."
    (_, body) = chat.received[-1]
    assert [message["content"] for message in body["messages"]] == [
        f"Stones? {HOSTILE}",
        "A better answer.",
        "And rivers?",
    ]
    assert len(pfm.PreferencePairs.from_jsonl(kept, on_bad_rows="drop")) == 2
