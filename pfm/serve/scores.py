"""Requests for scores and their answers, in the shapes of vLLM and, for rerank, of Cohere and Jina.

A score is b(y|x), the chance that an answer y beats an independent draw of the reference under its prompt x. A text
without an answer (white space, or reasoning that was cut off) scores 0.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pfm._internal.nesting import parse_json
from pfm.data.conversations import conversation_text
from pfm.generators.base import is_usable_text
from pfm.protocols import Flow
from pfm.serve.asked import EXTENSION, MAX_VALUES, read_messages, shown
from pfm.serve.config import ServeConfig
from pfm.serve.errors import Refused

__all__ = ["LABELS", "OWN_NAME", "PATHS", "ScoresAsked", "model_list", "read_scores", "scored"]

#: Which kind of score a path asks for.
PATHS = {
    "/v1/score": "score",
    "/score": "score",
    "/v1/rerank": "rerank",
    "/v2/rerank": "rerank",
    "/rerank": "rerank",
    "/v1/classify": "classify",
    "/classify": "classify",
}
LABELS = ("rejected", "preferred")  # probabilities 1 - b and b
OWN_NAME = "pfm"
# The names that vLLM knows for both sides of a score, the latest last.
_SIDES = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class ScoresAsked:
    """A request for scores as it is understood.

    Attributes:
        kind: "score", "rerank" or "classify".
        model: the model that is asked for; None where it is this flow.
        prompts: the prompt of each text. texts: what is to be scored.
        together: whether the texts are candidates of one prompt, each other's opponents where the flow has such.
        top_n: how many results a ranking has; 0 for all. return_documents: whether it repeats the texts.
    """

    kind: str
    model: str | None
    prompts: list[Messages] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    together: bool = False
    top_n: int = 0
    return_documents: bool = True


def read_scores(kind: str, content: bytes, config: ServeConfig, flow: Flow) -> ScoresAsked:
    """Read a request for scores.

    Args:
        kind: of :data:`PATHS`.
        content: the body as it came.
        config: names of this flow as a model, and limits.
        flow: says whether prompts are read.

    Returns:
        What is asked for; without its texts where another model is.

    Raises:
        Refused: a field is missing, of another type or out of range (400), or there are too many or too long texts
            (413); the message names the field and what was expected.
    """
    try:
        body = parse_json(content, max_values=MAX_VALUES)
    except ValueError:
        raise Refused(
            400, f"the body must be a JSON object of at most {MAX_VALUES:,} values", outcome="bad_request"
        ) from None
    if not isinstance(body, dict):
        raise Refused(400, f"the body must be a JSON object, got {shown(body)}", outcome="bad_request")
    model = body.get("model")
    if not isinstance(model, str | None):
        raise _bad("model", f"must be a text, got {shown(model)}")
    if model not in (None, "", OWN_NAME, config.score_model):
        return ScoresAsked(kind, model)
    reads_prompts = bool(flow.metadata.get("context_dimension"))
    read = {"score": _score, "rerank": _rerank, "classify": _classify}[kind]
    asked = read(body, config, reads_prompts)
    _check_sizes(asked, config, reads_prompts)
    return asked


def _score(body: Mapping[str, Any], config: ServeConfig, reads_prompts: bool) -> ScoresAsked:
    first, second = next((pair for pair in _SIDES if pair[0] in body and pair[1] in body), _SIDES[0])
    prompts, texts = _texts(body, first, config), _texts(body, second, config)
    if len(prompts) not in (1, len(texts)):
        raise _bad(
            second,
            f"must hold as many texts as {first}, or {first} must be one prompt: got {len(prompts)} and {len(texts)}",
        )
    asked = [_prompt(text, first, reads_prompts) for text in prompts]
    return ScoresAsked("score", None, asked * (len(texts) if len(asked) == 1 else 1), texts)


def _rerank(body: Mapping[str, Any], config: ServeConfig, reads_prompts: bool) -> ScoresAsked:
    query = body.get("query")
    if not isinstance(query, str):
        raise _bad("query", f"must be a text: the prompt, got {shown(query)}")
    texts = _texts(body, "documents", config)
    top_n = 0 if body.get("top_n") is None else body["top_n"]
    if isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 0:
        raise _bad("top_n", f"must be an integer of at least 0, where 0 returns all, got {shown(top_n)}")
    repeated = True if body.get("return_documents") is None else body["return_documents"]
    if not isinstance(repeated, bool):
        raise _bad("return_documents", f"must be true or false, got {shown(repeated)}")
    prompts = [_prompt(query, "query", reads_prompts)] * len(texts)
    return ScoresAsked("rerank", None, prompts, texts, True, top_n, repeated)


def _classify(body: Mapping[str, Any], config: ServeConfig, reads_prompts: bool) -> ScoresAsked:
    if (body.get("messages") is None) == (body.get("input") is None):
        raise _bad("input", "or messages must be given: texts, or a conversation that ends with the assistant's answer")
    if body.get("input") is not None:
        if reads_prompts:
            raise _bad(
                "input",
                "holds no prompt, and this flow reads prompts: send messages that end with the assistant's answer, or "
                "ask /v1/score",
            )
        texts = _texts(body, "input", config)
        return ScoresAsked("classify", None, [_prompt("", "input", False)] * len(texts), texts)
    messages = read_messages(body["messages"])
    if messages is None or messages[-1]["role"] != "assistant":
        raise _bad("messages", "must be messages with role and text whose last is the assistant's answer")
    answer = _checked(messages[-1]["content"], f"messages[{len(messages) - 1}]", config)
    prompt = messages[:-1]
    if reads_prompts and not is_usable_text(conversation_text(prompt) if prompt else ""):
        raise _bad("messages", "must hold a prompt of valid text before the answer: this flow reads prompts")
    return ScoresAsked("classify", None, [prompt], [answer])


def _texts(body: Mapping[str, Any], name: str, config: ServeConfig) -> list[str]:
    """Return the texts of a field: one text, or a list of texts or of objects with ``text``."""
    given = body.get(name)
    if given is None:
        raise _bad(name, "is missing: a text or a list of texts")
    parts = given if isinstance(given, list) else [given]
    if not parts:
        raise _bad(name, "must hold at least one text, got an empty list")
    if len(parts) > config.scored_texts:
        raise _large(name, f"holds {len(parts):,} texts, and one request may have {config.scored_texts:,}")
    one = f"{name}[{{}}]" if isinstance(given, list) else name
    return [_checked(_text(part, one.format(place)), one.format(place), config) for place, part in enumerate(parts)]


def _text(part: Any, name: str) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        raise _bad(name, f'must be a text, or an object as {{"text": "..."}}, got {shown(part)}')
    return text


def _checked(text: str, name: str, config: ServeConfig) -> str:
    if len(text) > config.text_characters:
        raise _large(name, f"has {len(text):,} characters, and a text may have {config.text_characters:,}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _bad(name, f"is no valid Unicode: half of a surrogate pair at character {error.start}") from None
    return text


def _prompt(text: str, name: str, reads_prompts: bool) -> Messages:
    if reads_prompts and not is_usable_text(text):
        raise _bad(name, "must hold a prompt: this flow reads prompts, got white space or half a surrogate pair")
    return [{"role": "user", "content": text}]


def _check_sizes(asked: ScoresAsked, config: ServeConfig, reads_prompts: bool) -> None:
    size = sum(map(len, asked.texts))
    if reads_prompts:
        prompts = {conversation_text(prompt) for prompt in asked.prompts}
        if any(len(prompt) > config.text_characters for prompt in prompts):
            raise _large("the prompt", f"has more than {config.text_characters:,} characters")
        size += sum(map(len, prompts))
    if size > config.judged_characters:
        raise _large(
            "the request",
            f"has {size:,} characters to encode, and one request may have {config.judged_characters:,}: send fewer "
            "at a time, or raise judged_characters of the server",
        )


# ------------------------------------------------------------------------------------------------------- answers


def scored(
    asked: ScoresAsked, b: Sequence[float], flow: Flow, model: str, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Write the answer to a request.

    Args:
        asked: the request. b: of each of its texts, by the flow.
        model: the name of this flow. seconds: what it took, by part.

    Returns:
        JSON values. ``usage`` counts 0 tokens: nothing was generated, and an encoder's tokens are nobody's currency.
    """
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    evidence = {"score": "win_probability", "against": _opponents(asked, flow), "seconds": dict(seconds)}
    head = {"id": f"{asked.kind}-{uuid.uuid4().hex}", "model": model}
    tail = {"usage": usage, EXTENSION: evidence}
    if asked.kind == "rerank":
        order = sorted(range(len(b)), key=lambda place: -b[place])[: asked.top_n or None]
        results = [{"index": place, "relevance_score": b[place]} for place in order]
        if asked.return_documents:
            results = [{**row, "document": {"text": asked.texts[row["index"]]}} for row in results]
        return {**head, "results": results, **tail}
    head |= {"object": "list", "created": int(time.time())}
    if asked.kind == "score":
        return {**head, "data": [{"index": k, "object": "score", "score": value} for k, value in enumerate(b)], **tail}
    data = [
        {"index": place, "label": LABELS[value >= 0.5], "probs": [1 - value, value], "num_classes": len(LABELS)}
        for place, value in enumerate(b)
    ]
    return {**head, "data": data, **tail}


def _opponents(asked: ScoresAsked, flow: Flow) -> str:
    """Say against what b is: candidates are each other's opponents where a preference model gives b."""
    by_model = any(getattr(part, "preference", None) is not None for part in getattr(flow, "flows", [flow]))
    return "candidates" if by_model and asked.together and len(asked.texts) > 1 else "reference"


def model_list(config: ServeConfig) -> dict[str, Any]:
    """Write the list of models of a server without an upstream."""
    return {"object": "list", "data": [{"id": config.score_model, "object": "model", "owned_by": "pfm"}]}


def _bad(name: str, problem: str) -> Refused:
    return Refused(400, f"{name} {problem}", outcome="bad_request", param=name.partition("[")[0])


def _large(name: str, problem: str) -> Refused:
    return Refused(413, f"{name} {problem}", outcome="bad_request", param=name.partition("[")[0])
