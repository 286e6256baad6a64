"""Draws from a generator, in sync or async, and a server's replies that name their question."""

from __future__ import annotations

import asyncio
from typing import Any

from pfm.generators import Draw

KEY = "sk-live-5ecret-0f-the-tests"


def named_reply(messages: list[dict[str, Any]], number: int) -> str:
    """Reply with the question and the number of the sample."""
    return f"{messages[-1]['content']} {number}"


def drawn(generator: Any, prompts: list[Any], n: int, how: str = "sync", **options: Any) -> list[Draw]:
    """Draw in one of the two ways."""
    if how == "sync":
        return list(generator.draws(prompts, n, **options))

    async def collect() -> list[Draw]:
        return [draw async for draw in generator.adraws(prompts, n, **options)]

    return asyncio.run(collect())
