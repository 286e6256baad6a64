"""Options of the command line that say how candidates become the output."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pfm.cli.shell import setting

__all__ = ["DecoderName", "DecoderOption", "DecoderSettings", "ExemplarsOption", "make_decoder"]

_PANEL = "Decoder"


class DecoderName(StrEnum):
    """A decoder of :mod:`pfm.decoders` that needs no more than a command line can name."""

    select = "select"
    rewrite = "rewrite"


DecoderOption = Annotated[
    DecoderName,
    typer.Option(
        "--decoder",
        help="Select the best candidate; or have the generator rewrite it too, shown --exemplars, and keep what is "
        "better.",
        rich_help_panel=_PANEL,
    ),
]
ExemplarsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="PAIRS|FOLDER",
        help="For --decoder rewrite: the pairs that the flow was fitted on, whose chosen outputs serve as examples; "
        "or a folder written by ExemplarBank.save.",
        rich_help_panel=_PANEL,
    ),
]
DecoderSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of the decoder, such as by=alignment, margin=0.02 or rounds=3; may be repeated.",
        rich_help_panel=_PANEL,
    ),
]


def make_decoder(
    name: DecoderName, settings: Sequence[str], exemplars: Path | None, encoder: Any, *, drawn: bool, progress: bool
) -> tuple[Any, list[Any]]:
    """Make the decoder that the options name.

    Args:
        name, settings, exemplars: as given.
        encoder: that of the flow, for exemplars that are not encoded yet.
        drawn: whether there is a generator.
        progress: show a progress bar while exemplars are encoded.

    Returns:
        the decoder, and JSON values on which its results depend.

    Raises:
        ValueError: the options contradict each other, a setting is unknown or out of range, or a file is unfit.
    """
    from pfm.decoders import ExemplarBank, Rewrite, Select

    kind: Any = Rewrite if name is DecoderName.rewrite else Select
    known = [key for key in inspect.signature(kind).parameters if key != "exemplars"]
    values = dict(setting(text, {}) for text in settings)
    foreign = [key for key in values if key not in known]
    if foreign:
        raise ValueError(f"--set: --decoder {name} has no {', '.join(foreign)}; it has {', '.join(known)}")
    if kind is Select:
        if exemplars is not None:
            raise ValueError("--exemplars belongs to --decoder rewrite")
        return Select(**values), [name.value, values] if values else []
    if exemplars is None:
        raise ValueError("--decoder rewrite needs --exemplars PAIRS: the pairs that the flow was fitted on")
    if not drawn:
        raise ValueError("--decoder rewrite needs a generator to write with: --model, --local-model or --generator")
    if exemplars.is_dir():
        bank = ExemplarBank.load(exemplars)
    else:
        from pfm.data.pairs import PreferencePairs

        bank = ExemplarBank.from_pairs(PreferencePairs.from_file(exemplars), encoder, progress=progress)
    digest = hashlib.sha256("\0".join(bank.texts).encode(errors="surrogatepass")).hexdigest()[:16]
    template = values.get("template")
    if template is not None and Path(str(template)).is_file():
        digest += hashlib.sha256(Path(str(template)).read_bytes()).hexdigest()[:16]
    return Rewrite(bank, **values), [name.value, values, digest]
