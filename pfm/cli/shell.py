"""The app and the options that commands share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from pfm.cli.session import UsageError, guarded, refuse_usage
from pfm.errors import UntrustedEncoderError

if TYPE_CHECKING:
    from pfm.encoders import Encoder
    from pfm.flow.composition import Composition
    from pfm.flow.preference_flow import PreferenceFlow
    from pfm.refiner import Stopping

__all__ = [
    "BadRowsOption",
    "EncoderOfFlow",
    "FlowFolder",
    "NoProgress",
    "OnBadRows",
    "Reasoning",
    "ReasoningOption",
    "TrustEncoder",
    "app",
    "examples",
    "fingerprint",
    "load_flow",
    "load_stopping",
    "setting",
]


class _Group(TyperGroup):
    """Writes mistakes as JSON where ``--json`` asks for it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments before the command's own."""
        with refuse_usage(args):
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command."""
        with refuse_usage(args):
            return super().resolve_command(ctx, args)


#: Options that name what a command writes, and those of them that name a folder or, of a folder of rows, may do so.
_WRITTEN = ("out", "html", "json_file", "track", "feedback")
_MAY_BE_FOLDERS = ("out",)


class _Command(TyperCommand):
    """Expands ``~`` in paths, which a shell leaves alone behind an equals sign; writes mistakes as JSON if asked to.

    A command that would write over a file that it reads stops before it begins.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; ``--json FILE``, as it was once, is taken for ``--json-file FILE``."""
        args = self._renamed(ctx, args)
        with refuse_usage(args):
            self._refuse_empty_places(args)
            return super().parse_args(ctx, args)

    def _renamed(self, ctx: Any, args: list[str]) -> list[str]:
        if all("--json-file" not in parameter.opts for parameter in self.params):
            return args
        old = next((place for place, word in enumerate(args) if word.startswith("--json=")), None)
        if old is not None:
            args = [*args[:old], "--json-file", args[old].partition("=")[2], *args[old + 1 :]]
        elif "--json" in args[:-1] and not args[args.index("--json") + 1].startswith("-"):
            try:
                extra = self.make_parser(ctx).parse_args(args=list(args))[1]
            except UsageError:
                return args
            if not extra:  # the word behind --json is an argument of the command
                return args
            old = args.index("--json")
            args = [*args[:old], "--json-file", *args[old + 1 :]]
        if old is not None:
            typer.echo("Note: --json FILE is now --json-file FILE; --json alone prints the result", err=True)
        return args

    def invoke(self, ctx: Any) -> Any:
        """Expand the paths, and run the command."""
        for name, value in ctx.params.items():
            if isinstance(value, list | tuple):
                ctx.params[name] = [item.expanduser() if isinstance(item, Path) else item for item in value]
            elif isinstance(value, Path):
                ctx.params[name] = value.expanduser()
        with guarded(bool(ctx.params.get("traceback")), bool(ctx.params.get("as_json"))):
            self._check_written(ctx.params)
        return super().invoke(ctx)

    def _refuse_empty_places(self, args: list[str]) -> None:
        """Refuse an empty place to write to, as of a variable that is not set; as a path it is the working folder."""
        options = {option for parameter in self.params if parameter.name in _WRITTEN for option in parameter.opts}
        for before, word in zip(["", *args], args, strict=False):
            option = before if not word else word.removesuffix("=")
            if option in options and (not word or word.endswith("=")):
                raise typer.BadParameter(f"{option} must name a place to write to: got an empty text")

    def _check_written(self, params: Mapping[str, Any]) -> None:
        """Refuse to write over a file that is read, or two results into one file.

        Raises:
            ValueError: a command line asks for it.
        """
        places = [
            (name, place)
            for name, value in params.items()
            for place in (value if isinstance(value, list | tuple) else (value,))
            if isinstance(place, Path)
        ]
        options = {parameter.name: max(parameter.opts, key=len) for parameter in self.params}
        written: dict[Path, str] = {}
        for name, place in places:
            if name not in _WRITTEN:
                continue
            option = options[name]
            if place.is_dir() and name not in _MAY_BE_FOLDERS:
                raise ValueError(f"{option} must be a file: {place} is a folder")
            for other, read in places:
                if other not in _WRITTEN and place.is_file() and read.is_file() and place.samefile(read):
                    raise ValueError(f"{option} must be another file than the input {read}")
            first = written.setdefault(place.absolute(), option)
            if first != option:
                raise ValueError(f"{first} and {option} must be two places: got {place} for both")


class _App(typer.Typer):
    def command(self, *arguments: Any, **settings: Any) -> Any:
        """Add a command of this kind."""
        return super().command(*arguments, **{"cls": _Command, **settings})


app = _App(
    help="Refine the outputs of any frozen generator with a learned preference flow.",
    epilog="Start with [cyan]pfm quickstart[/cyan]: two minutes, no data needed.",
    no_args_is_help=True,
    cls=_Group,
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
        help="Name of the encoder that the flow was fitted with, if the flow does not record it.",
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
    folder: Path, encoder: str | None, trust_encoder: bool = False, *, option: str = "--flow "
) -> tuple[PreferenceFlow | Composition, Encoder]:
    """Load a flow, or a composition of several, and its encoder; errors name the folder by its ``option``."""
    from pfm._internal.archive import finish_save
    from pfm._internal.hub import near_folder
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
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{option}{folder} is a file: expected the folder of a flow, made by pfm fit PAIRS --out")
        found = "holds no flow" if folder.is_dir() else "is no folder"
        looked = "" if folder.is_dir() else f"; looked in {folder.absolute().parent}{near_folder(str(folder))}"
        raise ValueError(f"{option}{folder} {found}: make one with pfm fit PAIRS --out {folder}{looked}")
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
