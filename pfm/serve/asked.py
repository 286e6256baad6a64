"""Read a chat request: what it asks of the proxy, and whether the proxy may refine its answer."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pfm._internal.nesting import parse_json
from pfm.data.conversations import conversation_text
from pfm.decoders import Select
from pfm.decoders.select import RULES
from pfm.generators.base import is_usable_text
from pfm.protocols import Flow
from pfm.reasoning import read_content
from pfm.refiner import Refiner
from pfm.refiner.stopping import Plan, Spend
from pfm.serve.config import ServeConfig
from pfm.serve.errors import Refused

__all__ = ["EXTENSION", "HEADER", "Asked", "Rule", "read", "read_messages", "shown"]

EXTENSION = "pfm"
HEADER = "x-pfm-"
MAX_VALUES = 500_000  # of a body; one with more is passed through unread
_OPTIONS = ("refine", "n", "max", "spend", "by", "margin", "strength")
# Fields whose answers have a shape or a meaning that choosing among texts would break.
_NOT_TEXT = ("tools", "functions", "tool_choice", "function_call", "logprobs", "top_logprobs", "audio", "prediction")
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


@dataclass(frozen=True)
class Rule:
    """How a candidate is chosen, see :class:`pfm.decoders.Select`."""

    by: str
    margin: float | None
    strength: float
    seed: int

    def decoder(self) -> Select:
        """Return the decoder that chooses so."""
        return Select(self.by, self.margin, strength=self.strength, seed=self.seed)


@dataclass(frozen=True)
class Asked:
    """A chat request as the proxy understands it.

    Attributes:
        body: the request for the upstream, without the extension; None if it is no JSON object.
        content: the bytes to pass on when it is not refined.
        prompt: the conversation, its contents as text.
        n, rule: how many candidates, and how one is chosen; ``rule`` is None where the decoder is not ours.
        plan: when drawing stops, where n is only the most; None: n candidates are drawn.
        stream: whether the answer is to be streamed.
        include_usage: whether the stream is to end with the usage.
        plain: why the answer is not refined but passed through; None if it is refined.
        unjudged: why one answer is drawn and not judged, where its prompt is too long to encode.
    """

    body: dict[str, Any] | None
    content: bytes
    prompt: list[dict[str, str]]
    n: int
    rule: Rule | None
    plan: Plan | None = None
    stream: bool = False
    include_usage: bool = False
    plain: str | None = None
    unjudged: str | None = None

    @property
    def key(self) -> str:
        """The text of the prompt, as encoders read it."""
        return conversation_text(self.prompt)


def read(content: bytes, headers: Mapping[str, str], config: ServeConfig, refiner: Refiner) -> Asked:
    """Read the body and the headers of a chat request.

    Args:
        content: the body as it came.
        headers: by lower-case name.
        config: the proxy's settings.
        refiner: its n and decoder, which the request's extension may change for itself, and its flow.

    Raises:
        Refused: the extension asks for what there is not; status 400.
    """
    try:
        body = parse_json(content, max_values=MAX_VALUES)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        return Asked(None, content, [], 1, None, plain="the body is no JSON object")
    extension = body.pop(EXTENSION, None)
    replaced = config.model is not None and body.get("model") != config.model
    if replaced:
        body["model"] = config.model
    if extension is not None or replaced:
        content = json.dumps(body).encode()
    options = _options(extension, headers)
    refine = options.pop("refine", True)
    n, plan, rule = _choice(options, config, refiner)
    streaming = body.get("stream_options")
    asked = Asked(
        body,
        content,
        [],
        n,
        rule,
        plan,
        stream=body.get("stream") is True,
        include_usage=isinstance(streaming, dict) and streaming.get("include_usage") is True,
        plain=_plain(body, refine, n, rule, refiner.flow),
    )
    if asked.plain is not None:
        return asked
    prompt = read_messages(body.get("messages"))
    if prompt is None:
        return dataclasses.replace(asked, plain="a message is not text")
    asked = dataclasses.replace(asked, prompt=prompt)
    key = asked.key
    if not is_usable_text(key):
        return dataclasses.replace(asked, plain="the prompt is empty or not valid text")
    if len(key) > config.text_characters and refiner.flow.metadata.get("context_dimension"):
        reason = f"the prompt is longer than {config.text_characters} characters"
        return dataclasses.replace(asked, n=1, plan=None, unjudged=reason)
    return asked


def _plain(body: Mapping[str, Any], refine: bool, n: int, rule: Rule | None, flow: Flow) -> str | None:
    """Return why the answer to a request is not refined, or None."""
    if not refine:
        return "the request asks for it"
    for name in _NOT_TEXT:
        if body.get(name) not in (None, False, []):
            return f"the request has {name}"
    form = body.get("response_format")
    if form is not None and not (isinstance(form, dict) and form.get("type") == "text"):
        return "the request has response_format"
    if body.get("n") not in (None, 1):
        return "the request has n"
    if body.get("modalities") not in (None, ["text"]):
        return "the request has modalities"
    if n > 1 and _is_zero(body.get("temperature")):
        return "temperature 0 gives one answer only"
    if n > 1 and _is_zero(body.get("top_p")):
        return "top_p 0 gives one answer only"
    if n > 1 and rule is not None and rule.by != "sample" and rule.margin is None and flow.guard_margin == math.inf:
        return "the flow's guard margin is infinite: it keeps every original"
    return None


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


def read_messages(messages: Any) -> list[dict[str, str]] | None:
    """Return the conversation with its contents as text, or None where one is something else."""
    if not isinstance(messages, list) or not messages:
        return None
    prompt = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return None
        content = message.get("content")
        if message["role"] == "assistant" and (parts := read_content(content)) is not None:
            content = parts.text
        elif isinstance(content, list):
            parts = [
                part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
            ]
            if not all(isinstance(part, str) for part in parts):
                return None
            content = "\n".join(part for part in parts if part is not None)
        if not isinstance(content, str):
            return None
        prompt.append({"role": message["role"], "content": content})
    return prompt


# ------------------------------------------------------------------------------------------------- the extension


def _options(extension: Any, headers: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of a request by name; the body's go before the headers'."""
    found: dict[str, Any] = {}
    for name in _OPTIONS:
        text = headers.get(HEADER + name)
        if text is not None:
            found[name] = _from_header(name, text.strip())
    if isinstance(extension, bool):
        extension = {"refine": extension}
    if extension is None:
        return found
    if not isinstance(extension, dict):
        raise _bad("", f"must be an object or a boolean, got {type(extension).__name__}")
    unknown = [name for name in extension if name not in _OPTIONS]
    if unknown:
        raise _bad(shown(unknown[0])[1:-1], f"is unknown; known are {', '.join(_OPTIONS)}")
    return found | extension


def _from_header(name: str, text: str) -> Any:
    if name == "by":
        return text
    if name == "refine":
        if text.lower() not in _TRUE + _FALSE:
            raise _bad(name, f"must be true or false, got {shown(text)}")
        return text.lower() in _TRUE
    if name == "n" and text.lower() == "auto":
        return "auto"
    try:
        return int(text) if name in ("n", "max") else float(text)
    except ValueError:
        raise _bad(name, f"must be a number, got {shown(text)}") from None


def _choice(options: Mapping[str, Any], config: ServeConfig, refiner: Refiner) -> tuple[int, Plan | None, Rule | None]:
    rule = _rule(options, refiner.decoder)
    n, most = options.get("n", "auto" if refiner.plan else refiner.n), max(config.max_n, refiner.n)
    if n == "auto":
        plan = _plan(options, most, refiner)
        if rule is not None and rule.by != "win_probability":
            raise _bad("n", f"auto stops by the best win probability so far: give a number with by={rule.by}")
        return plan.max_n, plan, rule
    for name in ("max", "spend"):
        if name in options:
            raise _bad(name, f"belongs to n=auto, got it with n={shown(n)}")
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= most:
        raise _bad("n", f"must be an integer from 1 to {most}, got {shown(n)}")
    return n, None, rule


def _plan(options: Mapping[str, Any], most: int, refiner: Refiner) -> Plan:
    if refiner.stopping is None:
        raise _bad("n", "must be a number: this proxy has no calibrated stopping rule for auto")
    usual = refiner.plan or refiner.stopping.plan()
    max_n = options.get("max", min(usual.max_n, most))
    if isinstance(max_n, bool) or not isinstance(max_n, int) or not 1 <= max_n <= most:
        raise _bad("max", f"must be an integer from 1 to {most}, got {shown(max_n)}")
    try:
        spend = Spend.read(options["spend"]) if "spend" in options else usual.spend
    except (TypeError, ValueError, OverflowError) as error:
        problem = f"must be the price of a draw in win probability, or an object with the price of a token: {error}"
        raise _bad("spend", problem.encode("ascii", "backslashreplace").decode()[:300]) from None
    return refiner.stopping.plan(max_n, spend)


def _rule(options: Mapping[str, Any], decoder: Any) -> Rule | None:
    asked = {name: options[name] for name in ("by", "margin", "strength") if name in options}
    if not isinstance(decoder, Select):
        if asked:
            raise _bad(next(iter(asked)), "has no effect: this proxy's decoder is not select")
        return None
    by = asked.get("by", decoder.by)
    if "strength" in asked and "by" not in asked:
        by = "sample"  # the one rule that strength has a meaning for
    if not isinstance(by, str) or by not in RULES:
        raise _bad("by", f"must be one of {', '.join(RULES)}, got {shown(by)}")
    margin, strength = asked.get("margin", decoder.margin), asked.get("strength", decoder.strength)
    if margin is not None and not _is_number(margin):
        raise _bad("margin", f"must be a number, or null for the flow's own, got {shown(margin)}")
    if not (_is_number(strength) and 0 <= strength < math.inf):
        raise _bad("strength", f"must be a finite number of at least 0, got {shown(strength)}")
    if "strength" in asked and strength != 1 and by != "sample":
        raise _bad("strength", f"has no effect with by={by}: the highest score stays the highest; use by=sample")
    return Rule(by, margin, float(strength) if by == "sample" else 1.0, decoder.seed)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return not math.isnan(value)
    except OverflowError:  # an integer beyond what a float holds
        return False


def shown(value: Any) -> str:
    """Write a value of a request for a message: in ASCII, since it may hold half a character, and not at any length."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _bad(name: str, problem: str) -> Refused:
    param = f"{EXTENSION}.{name}" if name else EXTENSION
    return Refused(400, f"{param} {problem}", outcome="bad_request", param=param)
