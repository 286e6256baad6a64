"""``pfm train-decoder``: train a network that edits texts towards points of an embedding space."""

from __future__ import annotations

import shutil
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from pfm.cli.session import Json, Session, Traceback, guarded
from pfm.cli.shell import NoProgress, app, examples

if TYPE_CHECKING:
    from pfm.decoders.editing import Writer


class Size(StrEnum):
    """Which network to train."""

    small = "small"
    smollm2 = "smollm2"


@app.command(
    "train-decoder",
    epilog=examples(
        "pfm train-decoder sentences.jsonl --out decoder/",
        "pfm train-decoder sentences.txt --out decoder/ --size smollm2 --minutes 10 --batch-size 384",
    ),
)
def train_decoder(
    texts: Annotated[
        Path,
        typer.Argument(
            help="Sentences: .jsonl, .json, .csv, .tsv or .parquet with a column of texts, or .txt with one per line.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to save the decoder to.", show_default=False)],
    size: Annotated[
        Size, typer.Option(help="small: a pointer network from scratch, for a CPU; smollm2: adapters of SmolLM2-135M.")
    ] = Size.small,
    encoder: Annotated[
        str, typer.Option(help="minilm, or a sentence-transformers name or folder: the encoder of your flow.")
    ] = "minilm",
    text_key: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    minutes: Annotated[
        float | None, typer.Option(help="Minutes to train, without encoding.", show_default="20")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of updates, in place of --minutes.")] = None,
    batch_size: Annotated[int, typer.Option(help="Number of edits per update.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    window: Annotated[int, typer.Option(help="Maximum number of tokens of a sentence; longer ones are left out.")] = 64,
    device: Annotated[str, typer.Option(help="Where to train: auto, cpu, cuda, cuda:1, ...")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the training.")] = 0,
    no_progress: NoProgress = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Train a network to edit sentences towards points of an embedding space.

    It learns from sentences alone; preferences come in with a flow, whose transport says where to go. Ctrl-C keeps
    what is done: run the same command again and it goes on from there.
    """
    with guarded(traceback, as_json) as session:
        from pfm.decoders.editing import EditData, TrainingConfig, save_writer, train_writer
        from pfm.decoders.editing.drafts import as_encode
        from pfm.devices import best_device
        from pfm.encoders import encoder_from_name

        if steps is not None and minutes is not None:
            raise ValueError(f"give --steps or --minutes, not both: got {steps} and {minutes}")
        config = TrainingConfig(
            steps=steps,
            minutes=None if steps is not None else 20.0 if minutes is None else minutes,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
        )
        where = best_device(device)
        sentences = _read(texts, text_key)
        session.out.print(f"{len(sentences):,} texts in {texts}")
        encoded_by = encoder_from_name(encoder)
        checkpoint = session.make_folder(out) / ".checkpoint"
        session.kept = lambda: (
            f"The state of the training is in {checkpoint}; run the same command again to go on from there."
            if any(checkpoint.glob("*.safetensors"))
            else "What was encoded is in the embedding cache; run the same command again to go on."
        )
        writer = _writer(size, sentences, encoded_by.dimension, window, where, seed)
        data = EditData.from_texts(
            sentences,
            as_encode(encoded_by, progress=not no_progress),
            writer.tokenize,
            window=window,
            seed=seed,
            device=where,
        )
        if data.dropped:
            session.note(f"{data.dropped:,} texts were left out: empty, repeated, or of {window} tokens and more")
        found = train_writer(writer, data, config, folder=checkpoint, progress=not no_progress)
        save_writer(writer, out, encoder=encoded_by.describe(), training=found)
        shutil.rmtree(checkpoint, ignore_errors=True)
        _show(session, writer, found, out)


def _read(path: Path, key: str) -> list[str]:
    """Read the texts of a file, one a row."""
    from pfm.data.errors import BadRows
    from pfm.data.readers import reader_for
    from pfm.data.spreadsheets import decode_text

    bad = BadRows(str(path), "raise")
    found: list[str] = []
    if path.suffix == ".txt":
        found += decode_text(path.read_bytes(), bad).splitlines()
    else:
        for number, row in reader_for(path)(path, bad):
            text = row if isinstance(row, str) else row.get(key) if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise ValueError(f"{path}, row {number}: there is no text in column {key!r}; name it with --text-key")
            found.append(text)
    texts = [text for text in found if text.strip()]
    if not texts:
        raise ValueError(f"{path}: there are no texts; expected one sentence a row")
    return texts


def _writer(size: Size, texts: list[str], dimension: int, window: int, device: Any, seed: int) -> Writer:
    import torch

    from pfm.decoders.editing import LanguageModelWriter, PointerWriter
    from pfm.decoders.editing.language_model import load_base

    torch.manual_seed(seed)
    if size is Size.small:
        return PointerWriter(PointerWriter.train_tokenizer(texts), dimension, window=window).to(device)
    base, tokenizer = load_base(device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return LanguageModelWriter(base, tokenizer, dimension, window=window)


def _show(session: Session, writer: Writer, found: dict[str, Any], out: Path) -> None:
    count = sum(value.numel() for value in writer.trained().values())
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in found["held_out"].items()) or "none held out"
    session.out.print(
        f"{found['steps']:,} updates in {found['seconds']:,.0f} s, {found['tokens_per_second']:,.0f} tokens/s, "
        f"{count:,} trained parameters"
    )
    session.out.print(f"Held-out loss in nats a token, by kind of draft: {losses}")
    session.out.print(Text(f"saved to {out}", "dim"), soft_wrap=True)
    session.result({"decoder": out, "training": found, "trained_parameters": count})
