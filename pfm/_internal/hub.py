"""Models of the hub and of folders: where a name leads, and why a model cannot be loaded, in one sentence."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from pfm._internal.proxies import proxy_of

__all__ = ["check_folder", "hub_problem", "loading_problem", "location", "near_folder"]

HUB = "https://huggingface.co"
_SHOWN = 200
# How the libraries of the hub say that neither a folder nor a repository of that name was found.
_NOT_FOUND = (
    "couldn't connect",
    "can't load",
    "cannot find",
    "is not a local folder",
    "not a valid model identifier",
    "offline",
    "repo id must be",
    "repository not found",
    "name or service not known",
    "not found",
    "404",
)


def location(name: str) -> str:
    """Return what libraries of the hub load from: a folder with its ``~`` expanded, or the name as it is."""
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def check_folder(name: str, argument: str) -> None:
    """Refuse at once what can only be a folder and is none.

    Raises:
        ValueError: the name is empty, or a path to where there is no folder.
    """
    if not name:
        raise ValueError(f"{argument} must name a model or a folder, got an empty string")
    if _looks_like_path(name) and not Path(name).expanduser().is_dir():
        raise ValueError(
            f"{argument}: there is no folder {name!r}{near_folder(name)}; pass a model's folder or its name on the hub"
        )


def loading_problem(name: str, error: BaseException, *, trusted: bool = False) -> str:
    """Explain in one sentence why a model cannot be loaded, and the way out.

    Args:
        name: of the model, as it was given.
        error: what loading it raised.
        trusted: whether code that comes with it was allowed to run.
    """
    text = " ".join(str(error).split())
    if "trust_remote_code" in text and not trusted:
        return (
            f"{name!r} comes with code of its own, which is run only if you say so: read it, and pass "
            "trust_remote_code=True"
        )
    said, folder = text.lower(), Path(name).expanduser()
    if "proxy" in said and not folder.is_dir():
        return f"{name!r} is not on this machine, and {hub_problem(error)}"
    if folder.is_dir() and not (folder / "config.json").is_file():
        return f"the folder {name!r} holds no config.json: is it that of a model?"
    if not folder.is_dir() and any(words in said for words in _NOT_FOUND):
        away = ", which cannot be reached from here" if "connect" in said or "name or service" in said else ""
        return (
            f"there is no folder {name!r} here{near_folder(name)}, and no such model was found on this machine or on "
            f"the hub{away}; check the spelling, or pass the folder of a model"
        )
    return _short(error)


def hub_problem(error: BaseException) -> str:
    """Explain why the hub cannot be reached; name the environment's variable where its proxy cannot be used."""
    if "proxy" in str(error).lower():
        try:
            proxy = proxy_of(os.environ.get("HF_ENDPOINT") or HUB)
        except ValueError as unusable:
            return str(unusable)
        if proxy is not None:
            return f"the hub cannot be reached through {proxy}: {_short(error)}"
    return _short(error)


def near_folder(name: str) -> str:
    """Return ``, did you mean '...'?`` where a folder of a similar name is there, else an empty text."""
    parts = Path(name).expanduser().parts
    found = Path(parts[0]) if parts and Path(parts[0]).is_absolute() else Path()
    for part in parts[1:] if parts and Path(parts[0]).is_absolute() else parts:
        if not (found / part).is_dir():
            try:
                there = [entry.name for entry in os.scandir(found) if entry.is_dir()]
            except OSError:
                return ""
            close = difflib.get_close_matches(part, there, 1)
            if not close:
                return ""
            part = close[0]
        found /= part
    return f" (did you mean {str(found)!r}?)" if parts else ""


def _looks_like_path(name: str) -> bool:
    return os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
