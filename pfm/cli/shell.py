"""The shell of every command: the app, common options, and what becomes of mistakes and of Ctrl-C."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shlex
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

from pfm.errors import PfmError, UntrustedEncoderError

if TYPE_CHECKING:
    from pfm.encoders import Encoder
    from pfm.evaluation.card import Card
    from pfm.flow.composition import Composition
    from pfm.flow.preference_flow import PreferenceFlow
    from pfm.refiner import Stopping

__all__ = [
    "SOME_FAILED",
    "BadRowsOption",
    "EncoderOfFlow",
    "FlowFolder",
    "NoProgress",
    "OnBadRows",
    "Reasoning",
    "ReasoningOption",
    "Session",
    "Traceback",
    "TrustEncoder",
    "app",
    "examples",
    "fingerprint",
    "guarded",
    "load_flow",
    "load_stopping",
    "setting",
]


MISTAKES = (ValueError, TypeError, OSError, ImportError, PfmError)
SOME_FAILED = 3
INTERRUPTED = 130


class _Command(TyperCommand):
    """Expands ``~`` in paths, which a shell leaves alone behind an equals sign."""

    def invoke(self, ctx: Any) -> Any:
        """Expand the paths, and run the command."""
        for name, value in ctx.params.items():
            if isinstance(value, list | tuple):
                ctx.params[name] = [item.expanduser() if isinstance(item, Path) else item for item in value]
            elif isinstance(value, Path):
                ctx.params[name] = value.expanduser()
        return super().invoke(ctx)


class _App(typer.Typer):
    def command(self, *arguments: Any, **settings: Any) -> Any:
        """Add a command of this kind."""
        return super().command(*arguments, **{"cls": _Command, **settings})


app = _App(
    help="Refine the outputs of any frozen generator with a learned preference flow.",
    epilog="Start with [cyan]pfm quickstart[/cyan]: two minutes, no data needed.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # its frames would hide a defect's own traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)


class OnBadRows(StrEnum):
    """What to do with a bad row."""

    stop = "raise"
    drop = "drop"


class Reasoning(StrEnum):
    """What to do with hidden reasoning in an output."""

    aside = "strip"
    keep = "keep"


def examples(*lines: str) -> str:
    """Write an epilog with one example a line."""
    return "\n".join(["[bold]Examples[/bold]", *(f"[cyan]{line}[/cyan]" for line in lines)])


FlowFolder = Annotated[
    Path,
    typer.Option("--flow", help="Folder of a flow made by [cyan]pfm fit[/cyan], or of a saved composition."),
]
EncoderOfFlow = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        help="Name of the encoder that the flow was fitted with, where the flow cannot tell.",
        show_default="the one that the flow names",
    ),
]
TrustEncoder = Annotated[
    bool,
    typer.Option(
        "--trust-encoder",
        help="Contact the endpoint, or open the folder, of the encoder that the flow names; without it, what would be "
        "contacted is shown.",
    ),
]
BadRowsOption = Annotated[
    OnBadRows, typer.Option("--on-bad-rows", help="Stop at a bad row, or drop and count such rows.")
]
ReasoningOption = Annotated[
    Reasoning,
    typer.Option(
        help="Judge of an output with hidden reasoning (<think>...</think> and the like) the answer after it, or keep "
        "all of it."
    ),
]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="Show no progress bars.")]
Traceback = Annotated[
    bool,
    typer.Option("--traceback", envvar="PFM_TRACEBACK", help="Show the traceback of a mistake too."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"preference-flow {version('preference-flow')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Refine the outputs of any frozen generator with a learned preference flow."""


@dataclass
class Session:
    """Holds the consoles of one command, and says what an interrupt or an error leaves behind."""

    out: Console = field(default_factory=lambda: Console(highlight=False))
    err: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))
    kept: Callable[[], str] = lambda: ""
    made: list[Path] = field(default_factory=list[Path])

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

    def show(self, report: Card, *, html: Path | None, json_file: Path | None) -> None:
        """Print a report, and write it to the files that are asked for."""
        self.out.print(report)
        if html is not None:
            report.save_html(html)
        if json_file is not None:
            report.save_json(json_file)
        for path in (html, json_file):
            if path is not None:
                self.out.print(Text(f"wrote {path}", "dim"), soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a warning in one line."""
        self.err.print(Text(f"Note: {_one_line(text)}", "yellow"), soft_wrap=True)


@contextmanager
def guarded(traceback: bool) -> Iterator[Session]:
    """Turn mistakes and Ctrl-C into a line and an exit code, warnings and log entries into lines."""
    session = Session()
    logger, handler = logging.getLogger("pfm"), _Notes(session)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: session.note(str(message))
        logger.addHandler(handler)
        try:
            yield session
        except KeyboardInterrupt:
            session.err.print(Text(f"\nInterrupted. {session.kept()}".rstrip(), "bold yellow"), soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None
        except MISTAKES as error:
            if traceback:
                raise
            session.err.print(Text(f"Error: {_in_words(error)}", "bold red"), soft_wrap=True)
            if isinstance(error, PfmError | OSError) and session.kept():  # it may pass, unlike a wrong argument
                session.err.print(Text(session.kept(), "yellow"), soft_wrap=True)
            raise typer.Exit(2) from None
        finally:
            logger.removeHandler(handler)
            session.remove_empty_folders()


class _Notes(logging.Handler):
    """Shows warnings of the library as lines."""

    def __init__(self, session: Session) -> None:
        super().__init__(logging.WARNING)
        self.session = session

    def emit(self, record: logging.LogRecord) -> None:
        self.session.note(record.getMessage())


def _in_words(error: BaseException) -> str:
    """Write an error in one line, with options in place of the arguments that the library names."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    text = text.replace('on_bad_rows="drop"', "--on-bad-rows drop").replace("max_pairs_per_prompt=", "--max-pairs")
    return _one_line(re.sub(r"\b(prompt|chosen|rejected|weight|group)_key=(None\b|'[^']*'|)", _key_option, text))


def _key_option(found: re.Match[str]) -> str:
    """Write ``prompt_key='question'`` as ``--prompt-key question``, and None as an empty name."""
    value = {"None": "''", "": ""}.get(found[2], shlex.quote(found[2][1:-1]))
    return f"--{found[1]}-key {value}".rstrip()


def _one_line(text: str) -> str:
    return " ".join(text.split())


def setting(text: str, switches: Collection[str]) -> tuple[str, Any]:
    """Read ``KEY=VALUE``, the value as what it looks like: a number, or text; of a switch, true or false."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise ValueError(f"--set takes KEY=VALUE: got {text!r}; for example --set seed=1")
    if key in switches:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"--set {key} must be true or false: got {value!r}")
        return key, value.lower() == "true"
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, value


def load_flow(
    folder: Path, encoder: str | None, trust_encoder: bool = False
) -> tuple[PreferenceFlow | Composition, Encoder]:
    """Load a flow, or a composition of several, and its encoder."""
    from pfm._internal.archive import finish_save
    from pfm.encoders import encoder_from_description, encoder_from_name
    from pfm.flow.composition import DESCRIPTION, Composition
    from pfm.flow.preference_flow import PreferenceFlow

    folder = folder.expanduser()
    finish_save(folder)
    if (folder / DESCRIPTION).is_file():
        flow = Composition.load(folder)
    elif (folder / "config.json").is_file():
        flow = PreferenceFlow.from_pretrained(folder)
    else:
        found = "holds no flow" if folder.is_dir() else "is no folder"
        raise ValueError(f"--flow {folder} {found}: make one with pfm fit PAIRS --out {folder}")
    if encoder is not None:
        return flow, encoder_from_name(encoder)
    try:
        return flow, encoder_from_description(flow.metadata.get("encoder"), trust_encoder=trust_encoder)
    except UntrustedEncoderError as error:
        raise ValueError(
            str(error).replace("trust_encoder=True", "--trust-encoder").replace("by hand", "by --encoder")
        ) from None
    except ValueError as error:
        raise ValueError(f"{error}; on the command line, --encoder NAME") from error


def load_stopping(folder: Path) -> Stopping | None:
    """Load the stopping rule beside a flow, or None where there is none.

    Raises:
        ValueError: it is damaged, or was calibrated with another flow.
    """
    from pfm.refiner.stopping import FILE, Stopping

    path = folder.expanduser() / FILE
    if not path.is_file():
        return None
    rule = Stopping.load(path)
    if json.loads(path.read_text(encoding="utf-8")).get("flow") not in (None, fingerprint(folder)):
        raise ValueError(f"{path} was calibrated with another flow: run pfm calibrate again, or remove it")
    return rule


def fingerprint(folder: Path) -> str:
    """Return a checksum of a saved flow, or of a composition with all of its flows."""
    digest = hashlib.sha256()
    folder = folder.expanduser()
    names = "config.json", "model.safetensors"
    if not (folder / names[0]).is_file():
        from pfm.flow.composition import DESCRIPTION

        names = DESCRIPTION, *(f"{part.name}/{name}" for part in sorted(folder.glob("flow-*")) for name in names)
    for name in names:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
