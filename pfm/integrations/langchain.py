"""A runnable for LangChain: a refined generator as one step of a chain."""

from __future__ import annotations

from typing import Any

from pfm.errors import GenerationError
from pfm.generators import Prompt
from pfm.refiner import Refinement, Refiner

__all__ = ["langchain_runnable"]

_ROLES = {"human": "user", "ai": "assistant", "system": "system"}


def langchain_runnable(refiner: Refiner) -> Any:
    """Return a runnable that takes a prompt and gives the refined answer as an ``AIMessage``.

    The prompt is a text, a prompt value, or a list of messages. The evidence is in the message's ``response_metadata``
    under ``pfm``: ``changed``, ``original``, ``win_probability``, ``probabilities``, ``reason``, ``calls``. A batch
    is drawn and judged together.

    Args:
        refiner: made by :func:`pfm.wrap`, with a generator.

    Raises:
        ImportError: langchain_core is not installed.
        TypeError: no Refiner. ValueError: it has no generator.
    """
    try:
        from langchain_core.messages import AIMessage  # pyright: ignore[reportMissingImports]
        from langchain_core.runnables import RunnableLambda  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("langchain_runnable needs langchain_core: pip install langchain-core") from error
    if not isinstance(refiner, Refiner):
        raise TypeError(f"refiner must be a Refiner, made by pfm.wrap, got {type(refiner).__name__}")
    if refiner.generator is None:
        raise ValueError("the refiner has no generator: pass one to pfm.wrap")

    def invoke(given: Any) -> AIMessage:
        return _message(AIMessage, refiner(_prompt(given)))

    async def ainvoke(given: Any) -> AIMessage:
        (result,) = await refiner.abatch([_prompt(given)])
        return _message(AIMessage, result)

    return RunnableLambda(invoke, afunc=ainvoke, name="pfm")


def _prompt(given: Any) -> Prompt:
    if isinstance(given, str):
        return given
    messages = given.to_messages() if hasattr(given, "to_messages") else given
    if not isinstance(messages, list | tuple) or not messages:
        raise TypeError(f"a prompt must be a text, a prompt value or a list of messages, got {type(given).__name__}")
    return [_turn(message, place) for place, message in enumerate(messages)]


def _turn(message: Any, place: int) -> dict[str, str]:
    if isinstance(message, dict):
        role, content = message.get("role"), message.get("content")
    else:
        kind, content = getattr(message, "type", None), getattr(message, "text", None)
        role = _ROLES.get(kind) if isinstance(kind, str) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise TypeError(
            f"messages[{place}] must be a system, human or AI message of text, got {type(message).__name__} of type "
            f"{getattr(message, 'type', None)!r}"
        )
    return {"role": role, "content": str(content)}


def _message(kind: Any, result: Refinement) -> Any:
    if not result.candidates:
        raise GenerationError(str(result.error), partial=result)
    names = ("changed", "original", "win_probability", "probabilities", "reason", "calls")
    return kind(content=result.text, response_metadata={"pfm": {name: getattr(result, name) for name in names}})
