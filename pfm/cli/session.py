"""What a command prints: its result, notes, mistakes and interrupts, for people or with ``--json`` for programs."""

from __future__ import annotations

import json
import logging
import math
import sys
import traceback as tracebacks
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.text import Text

from pfm.cli.wording import in_words, one_line, with_options
from pfm.errors import PfmError

if TYPE_CHECKING:
    from pfm.evaluation.card import Card
    from pfm.flow.distributed import Processes

__all__ = ["SOME_FAILED", "Json", "Session", "Traceback", "UsageError", "guarded", "refuse_usage", "several_processes"]

MISTAKES = (ValueError, TypeError, OSError, ImportError, PfmError)
DEFECT = 1
MISTAKE = 2
SOME_FAILED = 3
INTERRUPTED = 130
# typer carries click within itself, or depends on it: the class is reached from what both export.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

Traceback = Annotated[
    bool,
    typer.Option("--traceback", envvar="PFM_TRACEBACK", help="Show the traceback of a mistake too."),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as one line of JSON, and an error as JSON on standard error."),
]


@dataclass
class Session:
    """The output of one command.

    Attributes:
        out: console for people; silent with ``--json``.
        err: console for notes and mistakes.
        kept: says what an interrupt or an error leaves behind.
        as_json: whether the result is for a program.
        notes: warnings so far; they are part of the JSON result.
        made: folders that this command made.
        process: what the errors of another process than the first begin with; its notes are left to the first.
    """

    out: Console = field(default_factory=lambda: Console(highlight=False))
    err: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))
    kept: Callable[[], str] = lambda: ""
    as_json: bool = False
    notes: list[str] = field(default_factory=list)
    made: list[Path] = field(default_factory=list[Path])
    process: str = ""
    stdout: TextIO = field(default_factory=lambda: sys.stdout)

    def make_folder(self, folder: Path) -> Path:
        """Make a folder before the work begins, so that a place that cannot be written to shows at once."""
        new = [place for place in (folder, *folder.parents) if not place.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ValueError(f"{folder} must be a folder, and is a file") from None
        self.made += new
        return folder

    def remove_empty_folders(self) -> None:
        """Remove the folders that this command made and put nothing into."""
        for folder in self.made:
            with suppress(OSError):
                folder.rmdir()

    def result(self, values: Mapping[str, Any]) -> None:
        """Print the result with ``--json``, as one line on standard output; called once a command.

        Paths become texts, dataclasses objects, and numbers that are not finite null, which JSON lacks.
        """
        if self.as_json:
            self.stdout.write(_line({**values, "notes": self.notes}))
            self.stdout.flush()

    def show(self, report: Card, *, html: Path | None, json_file: Path | None) -> None:
        """Print a report, and write it to the files that are asked for."""
        self.out.print(report)
        if html is not None:
            report.save_html(html)
        if json_file is not None:
            report.save_json(json_file)
        written = [path for path in (html, json_file) if path is not None]
        for path in written:
            self.wrote(path)
        self.result({**report.to_dict(), "files": written})

    def wrote(self, path: Path) -> None:
        """Say that a file was written."""
        self.out.print(Text(f"wrote {path}", "dim"), soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a warning in one line."""
        if self.process:
            return
        self.notes.append(with_options(text))
        self.err.print(Text(f"Note: {self.notes[-1]}", "yellow"), soft_wrap=True)

    def fail(self, kind: str, message: str, *, style: str = "bold red") -> None:
        """Print why the command ends without a result."""
        if self.as_json:
            write_error(kind, self.process + message)
        else:
            self.err.print(Text(self.process + message, style), soft_wrap=True)


@contextmanager
def guarded(traceback: bool, as_json: bool = False) -> Iterator[Session]:
    """Turn mistakes and Ctrl-C into a line and an exit code, warnings and log entries into lines.

    With ``as_json`` whatever else prints to standard output (a user's function, a library) prints to standard error.
    """
    session = Session(as_json=as_json)
    logger, handler = logging.getLogger("pfm"), _Notes(session)
    with ExitStack() as stack:
        if as_json:
            session.out = Console(quiet=True)
            stack.enter_context(redirect_stdout(sys.stderr))
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = lambda message, *_, **__: session.note(str(message))
        logger.addHandler(handler)
        stack.callback(logger.removeHandler, handler)
        stack.callback(session.remove_empty_folders)
        try:
            yield session
        except KeyboardInterrupt:
            message = f"Interrupted. {session.kept()}".rstrip()
            session.fail("Interrupted", message if as_json else f"\n{message}", style="bold yellow")
            raise typer.Exit(INTERRUPTED) from None
        except MISTAKES as error:
            if traceback and not as_json:
                raise
            if traceback:
                tracebacks.print_exc()
            # it may pass, unlike a wrong argument
            kept = session.kept() if isinstance(error, PfmError | OSError) else ""
            if as_json:
                session.fail(type(error).__name__, f"{in_words(error)} {kept}".rstrip())
            else:
                session.fail(type(error).__name__, f"Error: {in_words(error)}")
                if kept:
                    session.err.print(Text(kept, "yellow"), soft_wrap=True)
            raise typer.Exit(MISTAKE) from None
        except Exception as error:
            if not as_json or isinstance(error, typer.Exit):
                raise
            tracebacks.print_exc()
            session.fail(type(error).__name__, one_line(str(error)))
            raise typer.Exit(DEFECT) from None


@contextmanager
def several_processes(session: Session) -> Iterator[Processes]:
    """Join the processes that torchrun started; others than the first print their errors alone, with their number."""
    from pfm.flow.distributed import processes

    with processes() as joined:
        if not joined.first:
            session.out.quiet = True
            session.process = f"process {joined.rank}: "
        yield joined


def write_error(kind: str, message: str) -> None:
    """Write an error for a program, as one line on standard error."""
    sys.stderr.write(_line({"error": {"type": kind, "message": message}}))
    sys.stderr.flush()


@contextmanager
def refuse_usage(arguments: Sequence[str]) -> Iterator[None]:
    """Write a mistake in the arguments themselves as JSON where ``--json`` is among them."""
    as_json = "--json" in arguments  # the parser may empty the list
    try:
        yield
    except UsageError as error:
        if not as_json:
            raise
        told = error.format_message() if hasattr(error, "format_message") else str(error)  # pyright: ignore
        write_error("UsageError", one_line(told))
        raise typer.Exit(MISTAKE) from None


class _Notes(logging.Handler):
    """Shows warnings of the library as lines."""

    def __init__(self, session: Session) -> None:
        super().__init__(logging.WARNING)
        self.session = session

    def emit(self, record: logging.LogRecord) -> None:
        self.session.note(record.getMessage())


def _line(values: Mapping[str, Any]) -> str:
    """Write one line of strict JSON in ASCII, which every terminal and locale can take."""
    return json.dumps(_plain(values), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if value is None or isinstance(value, str | int):
        return value
    item = getattr(value, "item", None)  # of NumPy's and torch's numbers
    return _plain(item()) if callable(item) else str(value)
