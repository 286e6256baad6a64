"""Spans of the proxy, as an exporter in memory gets them: parents, names, and nothing that was said."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.chat_server import ChatServer, running
from support.proxy import KEY, ask, eventually, fitted, post

import pfm
from pfm.serve import ServeConfig, create_app
from pfm.serve.tracing import Tracing, export_traces

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason='spans need pip install "preference-flow[otel]"')
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"
SECRET = "Question about a private matter?"
BODY: Any = {"model": "heeds-n", "messages": [{"role": "user", "content": SECRET}]}


@pytest.fixture
def spans():
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = sdk.TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider, exporter


@pytest.fixture(scope="module")
def refiner() -> pfm.Refiner:
    return pfm.wrap(None, fitted(), encoder=pfm.encoders.SurfaceEncoder(), n=3, margin=0.0)


def ended(exporter: Any, count: int) -> dict[str, Any]:
    """Wait until so many spans have ended: the last one ends when its answer has been sent."""
    eventually(lambda: len(exporter.get_finished_spans()) >= count)
    found = exporter.get_finished_spans()
    assert len(found) == count, [span.name for span in found]
    return {span.name: span for span in found}


def test_a_chat_has_a_span_with_three_children_below_its_clients(refiner, spans):
    provider, exporter = spans
    chat = ChatServer()
    with running(chat.app) as upstream:
        app = create_app(refiner, ServeConfig(upstream=upstream), tracer_provider=provider)
        with running(app) as url:
            answer = post(url, BODY, traceparent=PARENT, authorization=f"Bearer {KEY}").json()
            found = ended(exporter, 4)
    root = found["POST /v1/chat/completions"]
    assert f"{root.context.trace_id:032x}" == TRACE
    assert f"{root.parent.span_id:016x}" == SPAN
    assert root.kind.name == "SERVER"
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["pfm.outcome"] in ("changed", "kept")
    b = answer["pfm"]["win_probability"]
    assert root.attributes["pfm.win_probability.chosen"] == pytest.approx(b["chosen"])
    for name in ("chat heeds-n", "encode", "refine"):
        assert found[name].parent.span_id == root.context.span_id
        assert root.start_time <= found[name].start_time <= found[name].end_time <= root.end_time
    generate = found["chat heeds-n"]
    assert generate.kind.name == "CLIENT"
    assert generate.attributes["gen_ai.operation.name"] == "chat"
    assert generate.attributes["gen_ai.request.model"] == "heeds-n"
    assert generate.attributes["gen_ai.request.choice.count"] == 3
    assert generate.attributes["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"]
    assert generate.attributes["server.address"] == "127.0.0.1"
    assert generate.end_time <= found["encode"].end_time <= found["refine"].end_time
    # the upstream's own spans hang below the call that caused them
    headers, _ = chat.received[-1]
    assert headers["traceparent"] == f"00-{TRACE}-{generate.context.span_id:016x}-01"
    told = json.dumps([json.loads(span.to_json()) for span in exporter.get_finished_spans()])
    for secret in (SECRET, KEY, KEY[-8:], answer["choices"][0]["message"]["content"]):
        assert secret not in told


def test_streams_errors_and_what_is_passed_through_have_spans(refiner, spans):
    provider, exporter = spans
    chat = ChatServer()
    with (
        running(chat.app) as upstream,
        running(create_app(refiner, ServeConfig(upstream=upstream), tracer_provider=provider)) as url,
    ):
        ask(url, stream=True)
        assert len(ended(exporter, 4)) == 4
        exporter.clear()
        assert post(url, {**BODY, "tools": [{}], "stream": True}).status_code == 200
        found = ended(exporter, 2)
        assert found["relay chat/completions"].attributes["http.response.status_code"] == 200
        assert found["POST /v1/chat/completions"].attributes["pfm.outcome"] == "passed"
        exporter.clear()
        assert post(url, {**BODY, "model": "status-503"}).status_code == 503
        failed = ended(exporter, 2)["chat status-503"]
        assert failed.status.status_code.name == "ERROR"
        exporter.clear()
        assert post(url, {**BODY, "pfm": {"n": 0}}).status_code == 400
        refused = ended(exporter, 1)["POST /v1/chat/completions"]
        assert refused.attributes["pfm.outcome"] == "bad_request"
        assert refused.status.status_code.name == "UNSET"  # the client's fault, by the conventions
        assert refused.parent is None
        exporter.clear()
        assert post(url, {"text_1": "a", "text_2": ["b", "c"]}, "/score").status_code == 200
        assert set(ended(exporter, 3)) == {"POST /v1/score", "encode", "refine"}


@pytest.mark.parametrize("sent", ["", "nonsense", "00-0-0-00", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "é" * 40])
def test_a_malformed_parent_begins_a_new_trace(sent, spans):
    provider, exporter = spans
    tracing = Tracing("http://127.0.0.1:1/v1", provider)
    trace = tracing.begin("POST", "/v1/x", [(b"traceparent", sent.encode("latin-1"))])
    trace.end()
    trace.end("again")
    trace.set(pfm__late=1)
    (span,) = exporter.get_finished_spans()
    assert span.parent is None
    headers = trace.headers([(b"traceparent", b"old"), (b"accept", b"*/*")])
    assert dict(headers)[b"traceparent"].split(b"-")[1] == f"{span.context.trace_id:032x}".encode()
    assert (b"accept", b"*/*") in headers


def test_without_the_api_or_a_provider_headers_travel_as_they_came(monkeypatch):
    received = [(b"traceparent", PARENT.encode()), (b"x", b"y")]
    plain = Tracing("http://127.0.0.1:1/v1").begin("POST", "/v1/x", received)
    assert sorted(plain.generate("m", 2).headers(received)) == sorted(received)  # the API without an SDK hands it on
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry", None)
    none = Tracing("http://127.0.0.1:1/v1").begin("POST", "/v1/x", received)
    child = none.generate("m", 2)
    child.set(pfm__x=1)
    none.judged(2, 0.1, 0.1)
    assert child.headers(received) == received
    none.end("error")


def test_spans_are_sent_where_a_variable_names_a_collector(monkeypatch, tmp_path: Path):
    import subprocess
    import sys

    got: list[tuple[str, int]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, len(self.rfile.read(int(self.headers["content-length"])))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    code = (
        "from pfm.serve.tracing import Tracing, export_traces\n"
        "spans = export_traces()\n"
        "Tracing(None).begin('GET', '/v1/models', []).end()\n"
        "assert export_traces() is None\n"
        "spans.shutdown()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert [path for path, _ in got] == ["/v1/traces"]
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert export_traces() is None
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ImportError, match=r"preference-flow\[otel\]"):
        export_traces()
