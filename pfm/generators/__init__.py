"""Frozen generators: anything that turns a prompt into texts."""

from typing import TYPE_CHECKING, Any

from pfm.generators.base import Draw, Generator, Prompt
from pfm.generators.callable import AsyncCallableGenerator, BatchGenerator, CallableGenerator, as_generator

if TYPE_CHECKING:
    from pfm.generators.cache import ResponseCache
    from pfm.generators.cached import CachedGenerator
    from pfm.generators.openai import OpenAIGenerator
    from pfm.generators.pool import GeneratorPool
    from pfm.generators.transformers import TransformersGenerator

_HOME = {
    "CachedGenerator": "cached",
    "GeneratorPool": "pool",
    "OpenAIGenerator": "openai",
    "ResponseCache": "cache",
    "TransformersGenerator": "transformers",
}

__all__ = [
    "AsyncCallableGenerator",
    "BatchGenerator",
    "CachedGenerator",
    "CallableGenerator",
    "Draw",
    "Generator",
    "GeneratorPool",
    "OpenAIGenerator",
    "Prompt",
    "ResponseCache",
    "TransformersGenerator",
    "as_generator",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"pfm.generators.{_HOME[name]}"), name)
    raise AttributeError(f"module 'pfm.generators' has no attribute {name!r}")
