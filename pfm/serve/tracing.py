"""Spans of OpenTelemetry: one a request, with children that generate, encode and refine.

The API alone is imported (extra ``otel``); without it, or without a provider of spans, nothing is recorded. Parents are
given explicitly and no context is attached: requests wait in many tasks and end after their handler has returned.
Attributes hold names, numbers and outcomes, never a text and never a key. Their names are those of the semantic
conventions for generative AI (``gen_ai.*``) and HTTP where there are any, else ``pfm.*``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from pfm.serve.drawn import Header

__all__ = ["Trace", "Tracing", "export_traces"]

NAME_CHARACTERS = 128  # of a model's name, which clients choose
_PARENTS = (b"traceparent", b"tracestate")
# They ask SDKs of every language to send spans; without them nothing is set up.
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Tracing:
    """Begins the trace of a request.

    Args:
        upstream: the address of the server behind the proxy.
        provider: of spans; None: that of the process.
    """

    def __init__(self, upstream: str | None, provider: Any = None) -> None:
        self._server: dict[str, Any] = {}
        if upstream is not None:
            parts = urlsplit(upstream)
            self._server = {"server.address": parts.hostname, "server.port": parts.port}
        self._tracer = None
        try:
            from opentelemetry import trace
        except ImportError:
            return
        self._tracer = trace.get_tracer("pfm.serve", tracer_provider=provider)

    def begin(self, method: str, route: str, headers: Iterable[Header]) -> Trace:
        """Begin the span of a request, below the span that its ``traceparent`` names."""
        if self._tracer is None:
            return Trace(None, None, {})
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        sent = {name.decode(): value.decode("latin-1") for name, value in headers if name in _PARENTS}
        parent = TraceContextTextMapPropagator().extract(sent, Context())
        span = self._tracer.start_span(
            f"{method} {route}",
            parent,
            SpanKind.SERVER,
            {"http.request.method": method, "http.route": route},
        )
        if not span.is_recording() and not span.get_span_context().is_valid:  # nobody collects spans
            return Trace(None, None, {})
        return Trace(self._tracer, span, self._server)


class Trace:
    """The span of a request or of a part of it; does nothing where none is recorded.

    Args:
        tracer, span: of the API; None where it is not installed.
        server: attributes of calls of the upstream.
    """

    def __init__(self, tracer: Any, span: Any, server: Mapping[str, Any]) -> None:
        self._tracer = tracer
        self._span = span
        self._server = server
        self._ended = span is None

    def set(self, **attributes: Any) -> None:
        """Set attributes; ``__`` in a name stands for a dot, and what is None is left out."""
        if not self._ended:
            self._span.set_attributes(_attributes(attributes))

    def end(self, error: str | None = None) -> None:
        """End the span, as failed with the kind of an error; a second time does nothing."""
        if self._ended:
            return
        if error is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._ended = True
        self._span.end()

    def generate(self, model: Any, n: int | None = None) -> Trace:
        """Begin the span of drawing candidates from the upstream."""
        name = model[:NAME_CHARACTERS] if isinstance(model, str) else None
        return self._child(
            "chat" if name is None else f"chat {name}",
            call=True,
            gen_ai__operation__name="chat",
            gen_ai__provider__name="openai",  # whose protocol it speaks
            gen_ai__request__model=name,
            gen_ai__request__choice__count=n,
            **self._server,
        )

    def relay(self, path: str) -> Trace:
        """Begin the span of passing a request on."""
        return self._child(f"relay {path[:NAME_CHARACTERS]}", call=True, **self._server)

    def judged(self, texts: int, encoder_seconds: float, flow_seconds: float) -> None:
        """Record what encoding and refining took, one after the other until now.

        Requests are encoded in slices together: the seconds are those of the slices that held texts of this one.
        """
        if self._ended:
            return
        now = time.time_ns()
        between = now - int(flow_seconds * 1e9)
        start = between - int(encoder_seconds * 1e9)
        self._child("encode", start=start, gen_ai__operation__name="embeddings", pfm__texts=texts).end_at(between)
        self._child("refine", start=between, pfm__candidates=texts).end_at(now)

    def end_at(self, moment: int) -> None:
        """End the span at a time, in nanoseconds since 1970."""
        if not self._ended:
            self._ended = True
            self._span.end(moment)

    def headers(self, received: Iterable[Header]) -> list[Header]:
        """Return the headers of a request with this span as the parent of what the upstream records."""
        received = list(received)
        if self._span is None or not self._span.get_span_context().is_valid:
            return received
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(self._span, Context()))
        own = [(name.encode(), value.encode()) for name, value in carrier.items()]
        return [(name, value) for name, value in received if name not in _PARENTS] + own

    def _child(self, name: str, *, call: bool = False, start: int | None = None, **attributes: Any) -> Trace:
        if self._ended:
            return Trace(None, None, {})
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, set_span_in_context

        span = self._tracer.start_span(
            name,
            set_span_in_context(self._span, Context()),
            SpanKind.CLIENT if call else SpanKind.INTERNAL,
            _attributes(attributes),
            start_time=start,
        )
        return Trace(self._tracer, span, self._server)


def _attributes(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("__", "."): value for name, value in values.items() if value is not None}


def export_traces() -> Any:
    """Set up the SDK where a standard variable names a collector (``OTEL_EXPORTER_OTLP_ENDPOINT``).

    Returns:
        The provider, to be shut down at the end; None where no variable asks for it, or a provider is set up already
        (as by ``opentelemetry-instrument``).

    Raises:
        ImportError: a variable asks for it, and the SDK is not installed.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or not any(map(os.environ.get, _ENDPOINTS)):
        return None
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ImportError(
            f'spans are to be sent, and {error.name} is missing: pip install "preference-flow[otel]", or unset '
            f"{' and '.join(_ENDPOINTS)}",
            name=error.name,
        ) from error
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return None
    named = os.environ.get("OTEL_SERVICE_NAME") or "pfm-serve"
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: named}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider
