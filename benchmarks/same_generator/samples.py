"""Files of samples: a line that says how they were made, then one line a prompt.

A file grows as ``NAME.jsonl`` and is compressed to ``NAME.jsonl.gz`` when it is complete. What an interrupted run has
finished is found again, and a torn last line is dropped.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.core.data import MissingDataError
from pfm._internal.files import WriterLock, replace_file

__all__ = ["Sample", "SamplesError", "complete", "read_samples", "recipe_of"]

NOTED = ("date",)  # in a recipe, without effect on the samples


class SamplesError(ValueError):
    """Raised where a file is damaged, or was made in another way."""


@dataclass(frozen=True)
class Sample:
    """Holds what a model wrote for one prompt.

    Attributes:
        name: of the prompt. kind: of its instruction, or "sentiment".
        prompt: what was asked for; rivals that write prompts of their own keep the original one here.
        texts: n answers.
        prompt_tokens: of one call. completion_tokens: of all texts together.
        params: of the check.
        extra: what else is known, as JSON values.
    """

    name: str
    kind: str
    prompt: str
    texts: list[str]
    prompt_tokens: int
    completion_tokens: int
    params: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> float:
        """Return the tokens of one draw: the prompt's and a text's on average."""
        return self.prompt_tokens + self.completion_tokens / max(len(self.texts), 1)


def recipe_of(path: Path) -> dict[str, Any]:
    """Return how a file's samples were made; see :func:`read_samples`."""
    return json.loads(_lines(path)[0])["recipe"]


def read_samples(path: Path) -> list[Sample]:
    """Read the samples that are there, of a complete file or of one that still grows.

    Args:
        path: without ``.jsonl`` or ``.jsonl.gz``.

    Raises:
        MissingDataError: there is no such file.
        SamplesError: a line is no sample; names it.
    """
    found = []
    for number, line in enumerate(_lines(path)[1:], 2):
        try:
            sample = Sample(**json.loads(line))
            if not (isinstance(sample.prompt, str) and all(isinstance(text, str) for text in sample.texts)):
                raise TypeError("a text is no string")
        except (ValueError, TypeError) as error:
            raise SamplesError(f"{path}.jsonl, line {number}, is no sample ({error}): make the file again") from error
        found.append(sample)
    return found


def complete(
    path: Path,
    recipe: dict[str, Any],
    wanted: Sequence[str],
    make: Callable[[Sequence[str]], Iterable[Sample]],
    *,
    batch: int,
    progress: bool = True,
) -> list[Sample]:
    """Make the samples of the names that a file lacks, batch by batch, and return all that were wanted.

    Args:
        path: without ``.jsonl`` or ``.jsonl.gz``.
        recipe: what determines the samples, as JSON values.
        wanted: names, in the order in which they are made.
        make: gives the samples of some names; a name that it gives none for is tried again by the next run.
        batch: names at once.
        progress: show a progress bar.

    Raises:
        SamplesError: the file is damaged, or was made in another way.
        FileInUseError: another process writes it.
    """
    from tqdm.auto import tqdm

    path.parent.mkdir(parents=True, exist_ok=True)
    growing, packed = path.with_name(f"{path.name}.jsonl"), path.with_name(f"{path.name}.jsonl.gz")
    lock = WriterLock(growing).acquire()
    try:
        if packed.is_file() or growing.is_file():
            _check_recipe(path, recipe)
            done = {sample.name: sample for sample in read_samples(path)}
        else:
            done = {}
        missing = [name for name in wanted if name not in done]
        if missing:
            lines = [json.dumps({"recipe": recipe}), *(json.dumps(asdict(sample)) for sample in done.values())]
            # The file as it is, without a torn line, and unpacked if it was complete for fewer names.
            replace_file(growing, lambda partial: partial.write_text("\n".join(lines) + "\n", encoding="utf-8"))
            packed.unlink(missing_ok=True)
            with growing.open("a", encoding="utf-8") as file, tqdm(
                total=len(wanted), initial=len(wanted) - len(missing), unit="prompt", desc=path.name,
                disable=not progress,
            ) as bar:  # fmt: skip
                for start in range(0, len(missing), batch):
                    for sample in make(missing[start : start + batch]):
                        file.write(json.dumps(asdict(sample)) + "\n")
                        done[sample.name] = sample
                        bar.update()
                    file.flush()
        if growing.is_file() and all(name in done for name in wanted):
            replace_file(packed, lambda partial: partial.write_bytes(gzip.compress(growing.read_bytes(), mtime=0)))
            growing.unlink()
    finally:
        lock.release()
    return [done[name] for name in wanted if name in done]


def _check_recipe(path: Path, recipe: dict[str, Any]) -> None:
    theirs, ours = recipe_of(path), json.loads(json.dumps(recipe))
    for key in {**theirs, **ours}:
        if key not in NOTED and theirs.get(key) != ours.get(key):
            raise SamplesError(
                f"{path}.jsonl was made with {key}={theirs.get(key)!r}, and this run has {ours.get(key)!r}: use "
                "another folder"
            )


def _lines(path: Path) -> list[str]:
    growing, packed = path.with_name(f"{path.name}.jsonl"), path.with_name(f"{path.name}.jsonl.gz")
    if growing.is_file():
        whole = growing.read_text(encoding="utf-8")
    elif packed.is_file():
        try:
            whole = gzip.decompress(packed.read_bytes()).decode("utf-8")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise SamplesError(f"{packed} cannot be read ({error}): make the file again") from error
    else:
        raise MissingDataError(f"no samples at {packed}: make them with python -m benchmarks.same_generator.sample")
    lines = whole.split("\n")[:-1]  # what follows the last line break was torn off
    try:
        if "recipe" not in json.loads(lines[0]):
            raise ValueError("no recipe")
    except (IndexError, TypeError, ValueError) as error:
        raise SamplesError(f"{path}.jsonl does not begin with its recipe: make the file again") from error
    return lines
