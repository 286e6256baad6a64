"""``pfm serve``: an OpenAI-compatible proxy with a flow in it."""

from __future__ import annotations

import logging
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from pfm.cli.generator import candidate_count, spend_of
from pfm.cli.session import Json, Session, Traceback, guarded
from pfm.cli.shell import EncoderOfFlow, Reasoning, TrustEncoder, app, examples, load_flow, load_stopping

if TYPE_CHECKING:
    from pfm.serve import ServeConfig

# Settings of pfm.wrap that a file of settings may hold too.
CHOICE = ("n", "spend", "by", "margin", "strength", "seed", "reasoning")


@app.command(
    epilog=examples(
        "pfm serve flow/ --upstream http://localhost:8000/v1",
        "pfm serve flow/ --upstream https://api.openai.com/v1 -n 4 --port 9000",
        "pfm serve flow/ --upstream http://localhost:8000/v1 -n auto --max-n 16",
        "pfm serve flow/ --port 9000",
        "pfm serve flow/ --upstream http://localhost:8000/v1 --feedback feedback.jsonl",
        "pfm serve flow/ --config serve.toml --token-env PROXY_TOKEN --upstream-key-env OPENAI_API_KEY",
    )
)
def serve(
    flow: Annotated[Path, typer.Argument(help="Folder of a flow made by [cyan]pfm fit[/cyan].", show_default=False)],
    upstream: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Base URL of the server to refine; most end in /v1.", show_default="none: scores only"
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="File of settings, .toml or .json, named as the options are (max_n = 16); options go first."),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(help="Model to ask the upstream for.", show_default="the one that the client names"),
    ] = None,
    score_model: Annotated[
        str | None, typer.Option(help="Name of the flow in requests for scores.", show_default="its folder's")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0: a free one.", show_default="8100")] = None,
    n: Annotated[
        str | None,
        typer.Option(
            "-n",
            "--n",
            metavar="N|auto",
            help="Candidates per request; auto: until the best is good enough (see [cyan]pfm calibrate[/cyan]).",
            show_default="8",
        ),
    ] = None,
    spend: Annotated[
        str | None,
        typer.Option(
            metavar="PRICE",
            help="Price of a draw in win probability for -n auto, as 0.01, or of a token, as token=1e-5.",
            show_default="at which quality is that of the fixed number",
        ),
    ] = None,
    max_n: Annotated[int | None, typer.Option(help="Maximum candidates of a request.", show_default="32")] = None,
    by: Annotated[
        str | None,
        typer.Option(help="win_probability, alignment, combined or sample.", show_default="win_probability"),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(help="Minimum gain in win probability to change an answer.", show_default="the flow's own"),
    ] = None,
    strength: Annotated[float | None, typer.Option(help="Exponent of --by sample.", show_default="1.0")] = None,
    token_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Environment variable with the token that clients must send as their key."),
    ] = None,
    upstream_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Environment variable with the upstream's key.",
            show_default="clients' keys are passed on, unless there is a token",
        ),
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help="Concurrent requests.", show_default="32")] = None,
    queue: Annotated[
        int | None, typer.Option(help="Length of the queue; further requests get status 429.", show_default="128")
    ] = None,
    connections: Annotated[
        int | None, typer.Option(help="Concurrent calls of the upstream.", show_default="64")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Timeout for queueing and sampling, in seconds.", show_default="120")
    ] = None,
    reasoning: Annotated[
        Reasoning | None,
        typer.Option(
            help="Judge of an answer with hidden reasoning (<think>...</think> and the like) what follows it, or keep "
            "all of it.",
            show_default="strip",
        ),
    ] = None,
    judge_timeout: Annotated[
        float | None,
        typer.Option(help="Timeout for judging, in seconds; then the original is returned.", show_default="60"),
    ] = None,
    grace: Annotated[
        float | None, typer.Option(help="Seconds that a shutdown waits for active requests.", show_default="30")
    ] = None,
    read_timeout: Annotated[
        float | None,
        typer.Option(help="Timeout for a request's headers, and for its body, in seconds.", show_default="30"),
    ] = None,
    send_timeout: Annotated[
        float | None,
        typer.Option(help="Timeout for sending 64 KiB to a client, in seconds.", show_default="30"),
    ] = None,
    clients: Annotated[
        int | None, typer.Option(help="Maximum number of client connections.", show_default="1024")
    ] = None,
    request_bytes: Annotated[
        int | None, typer.Option(help="Maximum size of a chat request; beyond it status 413.", show_default="8 MiB")
    ] = None,
    reply_bytes: Annotated[
        int | None, typer.Option(help="Maximum size of an answer of the upstream.", show_default="16 MiB")
    ] = None,
    held_bytes: Annotated[
        int | None, typer.Option(help="Maximum bytes of bodies in memory; beyond it 503.", show_default="256 MiB")
    ] = None,
    text_characters: Annotated[
        int | None, typer.Option(help="Maximum length of a text to be judged, in characters.", show_default="32768")
    ] = None,
    judged_characters: Annotated[
        int | None, typer.Option(help="The same for all texts of a request together.", show_default="131072")
    ] = None,
    scored_texts: Annotated[
        int | None,
        typer.Option(help="Maximum texts of a request for scores; beyond it status 413.", show_default="4096"),
    ] = None,
    feedback: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Append feedback on answers (POST /v1/feedback, and the page /chat) to this file, as rows "
            "for [cyan]pfm fit[/cyan].",
            show_default="none is kept",
        ),
    ] = None,
    feedback_bytes: Annotated[
        int | None, typer.Option(help="Maximum size of the feedback file; beyond it status 507.", show_default="64 MiB")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Host name of this proxy, beside loopback's; may be repeated."),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Web pages that may use it (https://chat.example); may be repeated."),
    ] = None,
    encoder: EncoderOfFlow = None,
    trust_encoder: TrustEncoder = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the address, but no line for each request.")] = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Refine every answer of an OpenAI-compatible server, for clients that only change their base URL.

    Chat completions come back as the best of [cyan]-n[/cyan] candidates, with the evidence under the key
    [cyan]pfm[/cyan]; what cannot be refined (tools, response_format, other endpoints) is passed through. A request
    chooses for itself by a field [cyan]pfm[/cyan] in its body, as {"pfm": {"n": 4}}, {"pfm": {"n": "auto", "max": 16}}
    or {"pfm": false}, or by headers such as [cyan]x-pfm-n[/cyan]. [cyan]/healthz[/cyan] and [cyan]/metrics[/cyan] tell
    how it is.

    Scores of texts come from [cyan]/v1/score[/cyan], [cyan]/v1/rerank[/cyan] and [cyan]/v1/classify[/cyan], in the
    shapes of vLLM, Cohere and Jina, also without an upstream. With [cyan]--feedback[/cyan] ratings, edits and choices
    between answers are kept for the next fit.

    Keys are passed on and never kept. Ctrl-C ends what is under way first.
    """
    with guarded(traceback, as_json) as session:
        from pfm.serve import ServeConfig, run
        from pfm.serve.config import is_loopback

        given = {
            "upstream": upstream,
            "model": model_name,
            "host": host,
            "port": port,
            "n": n,
            "spend": spend_of(spend),
            "max_n": max_n,
            "by": by,
            "margin": margin,
            "strength": strength,
            "token_env": token_env,
            "upstream_key_env": upstream_key_env,
            "concurrency": concurrency,
            "queue": queue,
            "connections": connections,
            "timeout": timeout,
            "reasoning": None if reasoning is None else reasoning.value,
            "judge_timeout": judge_timeout,
            "grace": grace,
            "read_timeout": read_timeout,
            "send_timeout": send_timeout,
            "clients": clients,
            "request_bytes": request_bytes,
            "reply_bytes": reply_bytes,
            "held_bytes": held_bytes,
            "text_characters": text_characters,
            "judged_characters": judged_characters,
            "scored_texts": scored_texts,
            "score_model": score_model,
            "feedback": feedback,
            "feedback_bytes": feedback_bytes,
            "allowed_hosts": allowed_host or None,
            "allowed_origins": allowed_origin or None,
            "encoder": encoder,
        }
        settings = _settings(config, given)
        choice = {name: settings.pop(name) for name in CHOICE if name in settings}
        rule = load_stopping(flow)
        if "n" in choice:
            choice["n"] = candidate_count(choice["n"])
        if choice.get("n") == "auto":
            if rule is None:
                raise ValueError(
                    f"-n auto needs a stopping rule: make one with pfm calibrate SCORED --flow {flow}, or give -n 8"
                )
            choice["max_n"] = min(rule.max_n, settings.get("max_n", ServeConfig.max_n))
        fitted, with_encoder = load_flow(flow, settings.pop("encoder", None), trust_encoder, option="")
        name = flow.resolve().name
        settings.setdefault("score_model", name if name.strip() and name.isprintable() else "pfm")
        served = ServeConfig(**settings)
        for name in ("token_env", "upstream_key_env"):  # a missing one shows before the model is loaded
            served.secret(name)
        from pfm.refiner import wrap

        # A proxy runs for months and candidates hardly ever repeat: what it encodes is not kept on disk.
        for part in getattr(with_encoder, "encoders", [with_encoder]):
            if getattr(part, "cache", None) is not None:
                part.cache = None
        refiner = wrap(None, fitted, encoder=with_encoder, stopping=rule, **choice)
        refiner.refine([["One text.", "Another text."]], ["A prompt."])  # loads the model before the first request
        proxies = served.upstream is not None
        if (
            proxies
            and fitted.guard_margin == float("inf")
            and choice.get("margin") is None
            and choice.get("by") != "sample"
        ):
            session.note("this flow confirmed no gain: it keeps every original, so requests are passed through")
        if not is_loopback(served.host) and not served.token_env:
            what = "the upstream through it" if proxies else "it"
            session.note(f"whoever reaches {served.host} may use {what}; --token-env asks for a token")
        _log_requests(session, quiet)
        # After its own handling of SIGTERM, uvicorn raises it again: by then all is done, and well.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        from pfm.serve.tracing import export_traces

        spans = export_traces()
        try:
            run(refiner, served, on_start=lambda address: _show_start(session, served, address, quiet))
        except KeyboardInterrupt:
            session.err.print(Text("stopped", "dim"))
        finally:
            if spans is not None:
                spans.shutdown()  # sends what waits


def _settings(file: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the file, overruled by the options given."""
    from pfm.serve import ServeConfig, read_settings

    settings = {} if file is None else read_settings(file)
    known = [*(field.name for field in fields(ServeConfig)), *CHOICE, "encoder"]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ValueError(f"{file}: unknown settings: {', '.join(unknown)}; known are {', '.join(known)}")
    settings |= {name: value for name, value in given.items() if value is not None}
    return settings


def _show_start(session: Session, config: ServeConfig, address: str, quiet: bool) -> None:
    upstream = config.upstream
    if session.as_json:
        session.result({"address": address, "upstream": upstream, "score_model": config.score_model})
    else:  # plain, for programs that start this one and want the address
        typer.echo(f"scoring on {address}" if upstream is None else f"refining {upstream} on {address}")
    if not quiet:
        if config.feedback is not None and upstream is not None:
            chat = f"{address.removesuffix('/v1')}/chat"
            session.err.print(Text(f"a chat with feedback: {chat}", "dim"), soft_wrap=True)
        use = f'OpenAI(base_url="{address}")' if upstream is not None else f"POST {address}/score, /rerank, /classify"
        session.err.print(Text(f"a client uses it by {use}; Ctrl-C stops", "dim"), soft_wrap=True)


class _Lines(logging.Handler):
    """Writes what happens to each request in a line."""

    def __init__(self, session: Session) -> None:
        super().__init__(logging.INFO)
        self.session = session

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:  # those are shown as notes already
            self.session.err.print(Text(record.getMessage(), "dim"), soft_wrap=True)


def _log_requests(session: Session, quiet: bool) -> None:
    if not quiet:
        logger = logging.getLogger("pfm.serve")
        logger.setLevel(logging.INFO)
        logger.addHandler(_Lines(session))
