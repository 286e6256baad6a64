"""Options of the command line that say which generator draws the candidates."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["candidate_count", "describe_generator", "make_generator", "spend_of"]

_PANEL = "Generator of the candidates"
_API_PANEL = "With --model"


class Api(StrEnum):
    """The API of a server."""

    chat = "chat"
    responses = "responses"


GeneratorOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:NAME",
        help="Draw the candidates from this function of a prompt, or this generator, instead of reading them. "
        "The module is looked for in this folder first.",
        rich_help_panel=_PANEL,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Draw them from this model of an OpenAI-compatible server.", rich_help_panel=_PANEL),
]
LocalModelOption = Annotated[
    str | None,
    typer.Option(
        "--local-model",
        metavar="NAME",
        help="Draw them from this Transformers model, a folder or a name at the hub, on this machine.",
        rich_help_panel=_PANEL,
    ),
]
CandidateCount = Annotated[
    str,
    typer.Option(
        "-n",
        metavar="N|auto",
        help="Number of candidates per prompt; auto: until the best is good enough (see [cyan]pfm calibrate[/cyan]).",
        rich_help_panel=_PANEL,
    ),
]
MostCandidates = Annotated[
    int | None,
    typer.Option(
        "--max-n", min=1, help="Maximum of -n auto.", show_default="the calibration's", rich_help_panel=_PANEL
    ),
]
SpendOption = Annotated[
    str | None,
    typer.Option(
        "--spend",
        metavar="PRICE",
        help="Price of a draw in win probability for -n auto, as 0.01, or of a token, as token=1e-5.",
        show_default="at which quality is that of the fixed number",
        rich_help_panel=_PANEL,
    ),
]
ParameterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--parameter",
        "-p",
        metavar="KEY=VALUE",
        help="A parameter of the model, such as temperature=0.7; may be repeated. No other is sent.",
        rich_help_panel=_PANEL,
    ),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="Folder of the responses, so that no call is made twice.",
        show_default="PFM_CACHE, else the user's",
        rich_help_panel=_PANEL,
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Resample, and store no responses.", rich_help_panel=_PANEL)]
BaseUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Address of the server; most end in /v1.",
        show_default="OPENAI_BASE_URL, else OpenAI",
        rich_help_panel=_API_PANEL,
    ),
]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Environment variable that holds the key. A local server needs none.",
        show_default="OPENAI_API_KEY",
        rich_help_panel=_API_PANEL,
    ),
]
ApiOption = Annotated[Api, typer.Option(help="API of the server.", rich_help_panel=_API_PANEL)]
Concurrency = Annotated[int, typer.Option(min=1, help="Concurrent requests.", rich_help_panel=_API_PANEL)]
PerCall = Annotated[
    int | None,
    typer.Option(
        "--n-per-call", min=1, help="Maximum candidates per request.", show_default="-n", rich_help_panel=_API_PANEL
    ),
]
MaxCalls = Annotated[int | None, typer.Option(min=1, help="Stop after this many requests.", rich_help_panel=_API_PANEL)]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens-total", min=1, help="Stop after this many tokens.", rich_help_panel=_API_PANEL),
]
Timeout = Annotated[
    float | None,
    typer.Option(min=0.001, help="Timeout of one attempt, in seconds.", show_default="600", rich_help_panel=_API_PANEL),
]
Retries = Annotated[
    int | None,
    typer.Option(min=0, help="Retries of a failed request.", show_default="2", rich_help_panel=_API_PANEL),
]


def candidate_count(text: str | int) -> int | str:
    """Read ``-n``: a whole number of at least 1, or "auto".

    Raises:
        ValueError: it is neither.
    """
    from pfm._internal.checks import check_whole

    try:
        number = int(text)
    except ValueError:
        number = text
    return check_whole("-n", number, 1, also=("auto",))


def spend_of(text: str | None) -> float | dict[str, float] | None:
    """Read ``--spend``: a price, or ``token=PRICE``.

    Raises:
        ValueError: it is neither.
    """
    if text is None:
        return None
    name, equals, price = text.rpartition("=")
    try:
        value = float(price)
    except ValueError:
        value = None
    if value is None or (equals and name.strip() not in ("draw", "token")):
        raise ValueError(f"--spend must be a price, as 0.01 (of a draw), or token=1e-5; got {text!r}")
    return {name.strip(): value} if equals else value


def make_generator(
    *,
    generator: str | None = None,
    model: str | None = None,
    local_model: str | None = None,
    parameters: Sequence[str] = (),
    cache: Path | None = None,
    no_cache: bool = False,
    base_url: str | None = None,
    api_key_env: str | None = None,
    **api: Any,
) -> Any:
    """Make the generator that the options name, or return None if they name none.

    Args:
        api: further arguments of :class:`pfm.generators.OpenAIGenerator`.

    Raises:
        ValueError: the options contradict each other, or name nothing that is there.
    """
    given = {"--generator": generator, "--model": model, "--local-model": local_model}
    named = [option for option, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} name different generators: give one")
    if model is None:
        only = {"--base-url": base_url, "--api-key-env": api_key_env}
        foreign = [option for option, value in only.items() if value is not None]
        if foreign:
            raise ValueError(f"{', '.join(foreign)} belong to --model NAME, the name of the model at the server")
    if model is None and local_model is None and parameters:
        raise ValueError("--parameter belongs to --model or --local-model")
    if no_cache and cache is not None:
        raise ValueError("--cache and --no-cache contradict each other: give one")
    if generator is not None:
        return imported(generator)
    if not named:
        return None
    from pfm.generators import ResponseCache

    values = dict(_parameter(text) for text in parameters)
    responses = None if no_cache else ResponseCache(cache)
    if model is not None:
        from pfm.generators import OpenAIGenerator

        key = None
        if api_key_env is not None:
            key = os.environ.get(api_key_env)
            if not key:
                raise ValueError(f"--api-key-env {api_key_env}: there is no such environment variable, or it is empty")
        return OpenAIGenerator(model, base_url=base_url, api_key=key, cache=responses, **api, **values)
    from pfm.generators import CachedGenerator, TransformersGenerator

    local = TransformersGenerator(local_model, **values)
    return local if responses is None else CachedGenerator(local, responses)


def describe_generator(generator: Any, name: str | None) -> Any:
    """Return JSON values on which the texts of a generator depend: its own description, else its name."""
    described = getattr(generator, "describe", None)
    return described() if callable(described) else name


def imported(name: str) -> Any:
    """Import ``module:name``, from the current folder first."""
    module, colon, attribute = name.partition(":")
    if not (colon and module and attribute):
        raise ValueError(f"--generator must be MODULE:FUNCTION, as in my_bot:reply; got {name!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return attrgetter(attribute)(importlib.import_module(module))
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ValueError(f"--generator {name}: there is no module {module!r} in this folder or installed") from None
    except AttributeError as error:
        raise ValueError(f"--generator {name}: {error}") from None


def _parameter(text: str) -> tuple[str, Any]:
    """Read ``key=value``, the value as JSON where it is some, else as text."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--parameter takes KEY=VALUE: got {text!r}; for example --parameter temperature=0.7")
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        return key.strip(), value.strip()
