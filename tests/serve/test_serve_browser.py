"""The proxy from a page in a real browser: Chromium, where there is one."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from support.chat_server import ChatServer, running
from support.proxy import fitted

import pfm
from pfm.serve import ServeConfig, create_app

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGE = """<!doctype html><title>chat</title><script>
const tell = (found) => fetch("/found", {method: "POST", body: JSON.stringify(found)});
const options = {method: "POST", headers: {"content-type": "application/json", "authorization": "Bearer TOKEN",
    "x-stainless-lang": "js"}, body: JSON.stringify({model: "one", messages: [{role: "user", content: "Hello?"}]})};
fetch("URL/chat/completions", options).then(async (answer) => tell({
    page: location.hostname, status: answer.status, refined: answer.headers.get("x-pfm-refined"),
    body: await answer.json()
})).catch((error) => tell({page: location.hostname, error: String(error)}));
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
def test_only_pages_of_allowed_origins_can_use_the_proxy(tmp_path, monkeypatch):
    assert CHROMIUM is not None
    monkeypatch.setenv("PROXY_TOKEN", "token-of-the-proxy")
    found: queue.Queue[dict[str, Any]] = queue.Queue()
    pages = {"url": ""}

    class Page(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            text = PAGE.replace("URL", pages["url"]).replace("TOKEN", "token-of-the-proxy").encode()
            self.send_response(200 if self.path == "/" else 404)
            self.send_header("content-type", "text/html")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_POST(self) -> None:
            found.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

    site = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=site.serve_forever, args=(0.05,), daemon=True).start()
    port = site.server_port
    chat = ChatServer()
    refiner = pfm.wrap(None, fitted(), encoder=pfm.encoders.SurfaceEncoder(), n=2)
    with running(chat.app) as upstream:
        config = ServeConfig(
            upstream=upstream, token_env="PROXY_TOKEN", allowed_origins=[f"http://chat.example:{port}"]
        )
        with running(create_app(refiner, config)) as pages["url"]:
            for host, allowed in (("chat.example", True), ("evil.example", False), ("localhost", True)):
                chat.received.clear()
                browser = subprocess.Popen(
                    [
                        CHROMIUM,
                        "--headless=new",
                        "--no-sandbox",
                        "--disable-gpu",
                        "--disable-dev-shm-usage",
                        "--no-first-run",
                        f"--user-data-dir={tmp_path / host}",
                        "--host-resolver-rules=MAP *.example 127.0.0.1",
                        "--remote-debugging-port=0",  # stay, until stopped
                        f"http://{host}:{port}/",
                    ],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
                try:
                    seen = found.get(timeout=120)
                finally:
                    os.killpg(browser.pid, signal.SIGKILL)
                    browser.wait()
                assert seen["page"] == host
                if allowed:
                    assert (seen["status"], seen["refined"]) == (200, "true")
                    assert seen["body"]["choices"][0]["message"]["content"].startswith("Hello?: ")
                else:
                    assert "Failed to fetch" in seen["error"]
                    assert not chat.received
    site.shutdown()
    site.server_close()
