"""Frozen generators: anything that turns a prompt into texts."""

from pfm.generators.base import Draw, Generator, Prompt
from pfm.generators.callable import BatchGenerator, CallableGenerator, as_generator

__all__ = ["BatchGenerator", "CallableGenerator", "Draw", "Generator", "Prompt", "as_generator"]
