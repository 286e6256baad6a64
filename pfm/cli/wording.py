"""Messages of the library in the words of the command line: one line, options in place of arguments, near names."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from pathlib import Path

__all__ = ["in_words", "one_line", "with_options"]


def in_words(error: BaseException) -> str:
    """Write an error in one line, with options in place of the arguments that the library names."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
        if isinstance(error, FileNotFoundError) and isinstance(error.filename, str):
            text += _where(Path(error.filename))
    return with_options(text)


def _where(path: Path) -> str:
    """Say where a file was looked for, and which files there have a similar name."""
    from pfm._internal.hub import near_folder

    folder = path.absolute().parent
    if not folder.is_dir():
        return f"; there is no folder {folder}{near_folder(str(path.parent))}"
    try:
        names = [entry.name for entry in os.scandir(folder) if Path(entry.name).suffix == path.suffix]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, 2, cutoff=0.7)
    return f" in {folder}" + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")


# Arguments of the library, and the options that stand for them.
_OPTIONS = {
    'on_bad_rows="drop"': "--on-bad-rows drop",
    "max_pairs_per_prompt=": "--max-pairs",
    "pass api_key,": "name its variable by --api-key-env,",
    "pass it as api_key": "name its variable by --api-key-env",
    "pass api_key": "--api-key-env",
}


def with_options(text: str) -> str:
    """Write a message in one line, with options in place of the arguments that the library names."""
    for argument, option in _OPTIONS.items():
        text = text.replace(argument, option)
    text = re.sub(r"\bbase_url\b", "--base-url", text)
    return one_line(re.sub(r"\b(prompt|chosen|rejected|weight|group)_key=(None\b|'[^']*'|)", _key_option, text))


def _key_option(found: re.Match[str]) -> str:
    """Write ``prompt_key='question'`` as ``--prompt-key question``, and None as an empty name."""
    value = {"None": "''", "": ""}.get(found[2], shlex.quote(found[2][1:-1]))
    return f"--{found[1]}-key {value}".rstrip()


def one_line(text: str) -> str:
    """Join the lines of a text."""
    return " ".join(text.split())
