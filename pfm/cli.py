"""The command line: ``pfm fit | refine | evaluate | quickstart | cache``.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 a defect (with its
traceback), 2 a mistake of the user or a lack of this machine (one line), 3 some rows could not be refined, 130
interrupted. What is heavy to import is imported by the command that needs it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pfm.cli_generator import (
    Api,
    ApiKeyEnv,
    ApiOption,
    BaseUrl,
    CacheOption,
    CandidateCount,
    Concurrency,
    GeneratorOption,
    LocalModelOption,
    MaxCalls,
    MaxTokens,
    ModelOption,
    NoCache,
    ParameterOption,
    PerCall,
    Retries,
    Timeout,
    describe_generator,
    make_generator,
)
from pfm.errors import PfmError

if TYPE_CHECKING:
    from pfm.config import FlowConfig
    from pfm.encoded import EncodedPairs
    from pfm.encoders import Encoder
    from pfm.evaluation import Report
    from pfm.flow import PreferenceFlow
    from pfm.pairs import PreferencePairs
    from pfm.refiner import Refinement
    from pfm.rows import BadRows
    from pfm.statistics import Estimate

__all__ = ["app", "main"]

MISTAKES = (ValueError, TypeError, OSError, ImportError, PfmError)
SOME_FAILED = 3
INTERRUPTED = 130

app = typer.Typer(
    help="Refine the outputs of any frozen generator with a learned preference flow.",
    epilog="Start with [cyan]pfm quickstart[/cyan]: two minutes, no data needed.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # its frames would hide a defect's own traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    app()


class OnBadRows(StrEnum):
    """What to do with a bad row."""

    stop = "raise"
    drop = "drop"


class CacheAction(StrEnum):
    """What to do with the caches."""

    show = "show"
    clear = "clear"


def _examples(*lines: str) -> str:
    """Write an epilog with one example a line."""
    return "\n".join(["[bold]Examples[/bold]", *(f"[cyan]{line}[/cyan]" for line in lines)])


FlowFolder = Annotated[Path, typer.Option("--flow", help="Folder of a flow made by [cyan]pfm fit[/cyan].")]
EncoderOfFlow = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        help="Name of the encoder that the flow was fitted with, where the flow cannot tell.",
        show_default="the one that the flow names",
    ),
]
BadRowsOption = Annotated[
    OnBadRows, typer.Option("--on-bad-rows", help="Stop at a bad row, or drop and count such rows.")
]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="Show no progress bars.")]
Traceback = Annotated[
    bool,
    typer.Option("--traceback", envvar="PFM_TRACEBACK", help="Show the traceback of a mistake too."),
]


# ------------------------------------------------------------------------------------------------------ commands


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


@app.command(
    epilog=_examples(
        "pfm fit pairs.jsonl --out flow/",
        "pfm fit votes.csv --out flow/ --prompt-key question --on-bad-rows drop",
        "pfm fit pairs.parquet --out flow/ --encoder BAAI/bge-small-en-v1.5 --set sigma=0.1 --set epochs=50",
    )
)
def fit(
    pairs: Annotated[
        Path,
        typer.Argument(
            help="Rows with prompt, chosen, rejected: .jsonl, .json, .csv or .parquet.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to save the flow to.", show_default=False)],
    encoder: Annotated[
        str,
        typer.Option(help="minilm, surface, a sentence-transformers name or folder, or several joined by +."),
    ] = "minilm+surface",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of pfm.FlowConfig; may be repeated."),
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of the prompts to measure the flow on, not to fit it; 0 for none.")
    ] = 0.1,
    prompt_key: Annotated[str, typer.Option(help="Column of the prompt.")] = "prompt",
    chosen_key: Annotated[str, typer.Option(help="Column of the better response.")] = "chosen",
    rejected_key: Annotated[str, typer.Option(help="Column of the other response.")] = "rejected",
    weight_key: Annotated[
        str | None, typer.Option(help="Column of the pair's weight.", show_default="weight, if there is one")
    ] = None,
    group_key: Annotated[str, typer.Option(help="Column of what belongs together beyond the prompt.")] = "group",
    max_pairs: Annotated[
        int | None, typer.Option(help="Draw at most so many pairs of the labelled completions of one prompt.")
    ] = None,
    on_bad_rows: BadRowsOption = OnBadRows.stop,
    seed: Annotated[int, typer.Option(help="Seed of the split and of the fit.")] = 0,
    no_progress: NoProgress = False,
    traceback: Traceback = False,
) -> None:
    """Fit a flow on preference pairs, and measure it on prompts that it has not seen.

    Ctrl-C keeps what is done: run the same command again and it goes on from there.
    """
    with _guarded(traceback) as session:
        config = _config(settings or [], seed)
        from pfm.encoders import encoder_from_name
        from pfm.flow import PreferenceFlow
        from pfm.pairs import PreferencePairs

        loaded = PreferencePairs.from_file(
            pairs,
            prompt_key=prompt_key,
            chosen_key=chosen_key,
            rejected_key=rejected_key,
            weight_key=weight_key,
            group_key=group_key,
            max_pairs_per_prompt=max_pairs,
            seed=seed,
            on_bad_rows=on_bad_rows.value,
        )
        session.out.print(loaded.describe())
        train, measured = _split(loaded, held_out, seed)
        with_name = encoder_from_name(encoder)
        checkpoint = _made(out) / ".checkpoint"
        session.kept = lambda: (
            f"The state of the training is in {checkpoint}; run the same command again to go on from there."
            if any(checkpoint.glob("*.safetensors"))
            else "What was encoded is in the embedding cache; run the same command again to go on."
        )
        encoded = train.encode(with_name, progress=not no_progress)
        held = None if measured is None else measured.encode(with_name, progress=not no_progress)
        flow = PreferenceFlow.fit(encoded, config, progress=not no_progress, checkpoint=checkpoint)
        flow.save_pretrained(out)
        shutil.rmtree(checkpoint, ignore_errors=True)
        _show_fit(session, flow, held, out)


@app.command(
    epilog=_examples(
        "pfm refine outputs.jsonl --flow flow/ --out refined.jsonl",
        "pfm refine prompts.jsonl --flow flow/ --out refined.jsonl --model qwen3 --base-url http://localhost:8000/v1",
        "pfm refine prompts.jsonl --flow flow/ --out refined.jsonl --generator my_bot:reply -n 8",
    )
)
def refine(
    rows: Annotated[
        Path,
        typer.Argument(
            help="Rows with prompt and candidates (a list, the original first), or prompt and output.",
            show_default=False,
        ),
    ],
    flow: FlowFolder,
    out: Annotated[Path, typer.Option("--out", "-o", help="File of results (.jsonl), one line a row.")],
    generator: GeneratorOption = None,
    model: ModelOption = None,
    local_model: LocalModelOption = None,
    n: CandidateCount = 8,
    parameter: ParameterOption = None,
    response_cache: CacheOption = None,
    no_cache: NoCache = False,
    base_url: BaseUrl = None,
    api_key_env: ApiKeyEnv = None,
    api: ApiOption = Api.chat,
    concurrency: Concurrency = 8,
    n_per_call: PerCall = None,
    max_calls: MaxCalls = None,
    max_tokens_total: MaxTokens = None,
    timeout: Timeout = None,
    retries: Retries = None,
    encoder: EncoderOfFlow = None,
    no_progress: NoProgress = False,
    traceback: Traceback = False,
) -> None:
    """Pick the best candidate of every row, or keep the original.

    The candidates are read from the rows, or drawn from the generator that an option names.
    Results are written as they come, with all columns of their rows.
    Run the same command again to go on after Ctrl-C, or to retry rows with errors.
    Exit code 3: some rows have errors, see their column [cyan]error[/cyan].
    """
    with _guarded(traceback) as session:
        fitted, with_encoder = _load(flow, encoder)
        from pfm.generators.base import first_samples
        from pfm.refiner import wrap

        source = make_generator(
            generator=generator,
            model=model,
            local_model=local_model,
            parameters=parameter or (),
            cache=response_cache,
            no_cache=no_cache,
            base_url=base_url,
            api_key_env=api_key_env,
            api=api.value,
            concurrency=concurrency,
            n_per_call=n_per_call,
            max_calls=max_calls,
            max_tokens_total=max_tokens_total,
            timeout=timeout,
            max_retries=retries,
        )
        drawn = source is not None
        refiner = wrap(source, fitted, encoder=with_encoder, n=n)
        origin = [_fingerprint(flow), encoder, *([describe_generator(source, generator), n] if drawn else [])]
        asked = _read_rows(rows, origin, drawn=drawn, prompted=bool(fitted.metadata.get("context_dimension")))
        if out.exists() and out.samefile(rows):
            raise ValueError(f"--out must be another file than the input {rows}")
        _made(out.parent)
        with _Results(out, asked) as results:
            session.kept = results.progress
            waiting = results.waiting()
            sound = [row for row in waiting if row.error is None]
            prompts = [row.prompt for row in sound]

            def keep(result: Refinement) -> None:
                results.add_up_to(sound[results.refined], result)

            if drawn:
                # By its place among all rows, so that a prompt that comes twice gets the same draws in a second run.
                whole = [row for row in asked if row.error is None]
                numbers = first_samples([row.prompt for row in whole], n)
                first = {row.number: number for row, number in zip(whole, numbers, strict=True)}
                start = [first[row.number] for row in sound]
                refiner.batch(prompts, progress=not no_progress, on_result=keep, start=start)
            else:
                refiner.refine([row.candidates for row in sound], prompts, progress=not no_progress, on_result=keep)
            results.finish()
        _show_refined(session, results, len(asked) - len(waiting))
        if results.errors:
            raise typer.Exit(SOME_FAILED)


@app.command(
    epilog=_examples(
        "pfm evaluate scored.jsonl --flow flow/ --pairs pairs.jsonl --html report.html",
        "pfm evaluate scored.jsonl --flow flow/ --json report.json",
    )
)
def evaluate(
    rows: Annotated[
        Path,
        typer.Argument(
            help="Rows with prompt, candidates (the original first) and scores, one a candidate, higher is better; "
            "optional: group, and independent_score, that of a further draw. Results of [cyan]pfm refine[/cyan] "
            "carry such columns along.",
            show_default=False,
        ),
    ],
    flow: FlowFolder,
    pairs: Annotated[
        Path | None,
        typer.Option(help="The pairs that the flow was fitted on: for the baselines mean shift and Bradley–Terry."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
    encoder: EncoderOfFlow = None,
    on_bad_rows: BadRowsOption = OnBadRows.stop,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    no_progress: NoProgress = False,
    traceback: Traceback = False,
) -> None:
    """Say how much better the flow's picks are, by scores that it has not seen, and against what."""
    with _guarded(traceback) as session:
        fitted, with_encoder = _load(flow, encoder)
        from pfm.pairs import PreferencePairs
        from pfm.refiner import wrap

        context = bool(fitted.metadata.get("context_dimension"))
        scored = _read_scored(rows, on_bad_rows.value, prompted=context)
        training = None if pairs is None else PreferencePairs.from_file(pairs, on_bad_rows=on_bad_rows.value)
        for path in (html, json_file):
            if path is not None:
                _made(path.parent)
        refiner = wrap(None, fitted, encoder=with_encoder)
        records = refiner.refine(
            [row.candidates for row in scored], [row.prompt for row in scored], progress=not no_progress
        )
        encoded = None
        if training is not None:
            encoded = training.encode(with_encoder, context=context, progress=not no_progress)
        report = _report(scored, records, encoded, with_encoder, seed, not no_progress)
        report.settings["judge"] = f"column scores of {rows.name}"
        if training is not None:
            _warn_of_leaks(report, scored, training)
        session.out.print(report)
        if html is not None:
            report.save_html(html)
        if json_file is not None:
            report.save_json(json_file)
        for path in (html, json_file):
            if path is not None:
                session.out.print(Text(f"wrote {path}", "dim"), soft_wrap=True)


@app.command(epilog=_examples("pfm quickstart", "pfm quickstart --out try/ --seed 1"))
def quickstart(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write report and flow to.")] = Path("quickstart"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    no_progress: NoProgress = False,
    traceback: Traceback = False,
) -> None:
    """Run the whole road on data that ships with the package: fit, refine, evaluate.

    It needs no network, no key and no data, and takes about two minutes on two cores.
    """
    with _guarded(traceback) as session:
        from huggingface_hub import constants

        # Set for libraries still to be imported, and in the one that is: the run must not depend on the network.
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        from pfm.quickstart import run

        session.kept = lambda: "What was encoded is in the embedding cache: a second run is faster."
        run(out, seed, session.out, not no_progress)


@app.command(epilog=_examples("pfm cache", "pfm cache clear"))
def cache(
    action: Annotated[CacheAction, typer.Argument(help="Show its size, or delete all that is in it.")] = (
        CacheAction.show
    ),
    traceback: Traceback = False,
) -> None:
    """Show or clear the caches of embeddings and responses.

    They lie in [cyan]PFM_CACHE[/cyan] or the user's cache folder.
    """
    with _guarded(traceback) as session:
        from pfm.encoders import EmbeddingCache
        from pfm.generators import ResponseCache

        for stored, what in ((EmbeddingCache(), "embeddings"), (ResponseCache(), "responses")):
            found = f"{len(stored):,} {what}, {stored.size_bytes / 1e6:,.1f} MB, in {stored.folder}"
            if action is CacheAction.clear:
                stored.clear()
                found = f"deleted {found}"
            session.out.print(Text(found), soft_wrap=True)


# ------------------------------------------------------------------------- what goes wrong, and what is kept then


@dataclass
class _Session:
    """Holds the consoles of one command, and says what an interrupt or an error leaves behind."""

    out: Console = field(default_factory=lambda: Console(highlight=False))
    err: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))
    kept: Callable[[], str] = lambda: ""

    def note(self, text: str) -> None:
        """Print a warning in one line."""
        self.err.print(Text(f"Note: {_one_line(text)}", "yellow"), soft_wrap=True)


@contextmanager
def _guarded(traceback: bool) -> Iterator[_Session]:
    """Turn mistakes and Ctrl-C into a line and an exit code, warnings and log entries into lines."""
    session = _Session()
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


class _Notes(logging.Handler):
    """Shows warnings of the library as lines."""

    def __init__(self, session: _Session) -> None:
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
    return _one_line(re.sub(r"\b(prompt|chosen|rejected|weight|group)_key=", r"--\1-key", text))


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------------------------ fit


def _config(settings: Sequence[str], seed: int) -> FlowConfig:
    from pfm.config import FlowConfig

    defaults = {item.name: item.default for item in fields(FlowConfig)}
    values: dict[str, Any] = {"seed": seed}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ValueError(f"--set takes KEY=VALUE: got {setting!r}; for example --set sigma=0.1")
        values[key] = _value(key, text.strip(), isinstance(defaults.get(key), bool))
    return FlowConfig.from_dict(values)


def _value(key: str, text: str, switch: bool) -> Any:
    """Read a value as what it looks like: a number, or text; as true or false where the setting is a switch."""
    if switch:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"--set {key} must be true or false: got {text!r}")
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _split(pairs: PreferencePairs, held_out: float, seed: int) -> tuple[PreferencePairs, PreferencePairs | None]:
    if held_out == 0:
        return pairs, None
    try:
        return pairs.split(held_out, seed)
    except ValueError as error:
        raise ValueError(f"{error}; --held-out 0 fits on all rows and measures nothing") from None


def _made(folder: Path) -> Path:
    """Make a folder before the work begins, so that a place that cannot be written to shows at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"{folder} must be a folder, and is a file") from None
    return folder


def _show_fit(session: _Session, flow: PreferenceFlow, held: EncodedPairs | None, out: Path) -> None:
    first, *rest = flow.summary().splitlines()
    session.out.print(Panel(Text("\n".join(line.strip() for line in rest)), title=Text(first), title_align="left"))
    if held is not None:
        right = _held_out_accuracy(flow, held)
        session.out.print(
            Text.assemble(
                "Prompts held out: ",
                (right.text(percent=True), "bold"),
                f" of {len(held):,} pairs ordered rightly, 95% interval over {len(held.group.unique()):,} prompts "
                "(a coin: 50%).",
            )
        )
        if right.low <= 0.5:
            session.note("on held-out prompts this flow cannot be told from a coin: more pairs, or cleaner ones, help")
    if flow.guard_margin == float("inf"):
        session.note("no gain in win probability was confirmed, so refining with this flow keeps every original")
    session.out.print(Text(f"saved to {out}", "dim"), soft_wrap=True)


def _held_out_accuracy(flow: PreferenceFlow, held: EncodedPairs) -> Estimate:
    """Give the weighted share of pairs whose order by b agrees with the label, ties half."""
    import torch

    from pfm.statistics import Bootstrap

    rows = held.gather(torch.arange(len(held)))
    gap = flow.win_probability(held.chosen, rows.context) - flow.win_probability(held.rejected, rows.context)
    right = 0.5 + 0.5 * (2 * rows.probability - 1) * gap.cpu().sign()
    names, member = held.group.unique(return_inverse=True)
    totals = [torch.zeros(len(names)).index_add_(0, member, part) for part in (right * rows.weight, rows.weight)]
    estimate = Bootstrap(len(names)).ratio(*totals)
    if estimate is None:
        raise ValueError("the held-out pairs have weight 0 in all: choose another --seed or --held-out")
    return estimate


# --------------------------------------------------------------------------------------------- refine and evaluate


def _load(folder: Path, encoder: str | None) -> tuple[PreferenceFlow, Encoder]:
    from pfm.encoders import encoder_from_description, encoder_from_name
    from pfm.flow import PreferenceFlow

    if not (folder / "config.json").is_file():
        found = "holds no flow" if folder.is_dir() else "is no folder"
        raise ValueError(f"--flow {folder} {found}: make one with pfm fit PAIRS --out {folder}")
    flow = PreferenceFlow.from_pretrained(folder)
    if encoder is not None:
        return flow, encoder_from_name(encoder)
    try:
        return flow, encoder_from_description(flow.metadata.get("encoder"))
    except ValueError as error:
        raise ValueError(f"{error}; on the command line, --encoder NAME") from error


def _fingerprint(folder: Path) -> str:
    """Give a checksum of a saved flow."""
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Row:
    """Holds a row to refine, or what is wrong with it; ``digest`` changes with all that the result depends on."""

    number: int
    prompt: Any
    candidates: list[Any]
    columns: Mapping[str, Any]
    error: str | None
    digest: str


def _reader(path: Path) -> tuple[Callable[[Path, BadRows], Iterator[tuple[int, Any]]], str]:
    """Find the reader of a file, and what it counts."""
    from pfm.rows import read_jsonl, reader_for

    reader = reader_for(path)
    return reader, "line" if reader is read_jsonl else "row"


def _read_rows(path: Path, origin: Sequence[Any], *, drawn: bool, prompted: bool) -> list[_Row]:
    """Read the rows to refine, bad ones with their error, in the order of the file."""
    from pfm.rows import BadRows, PreferenceDataError

    reader, unit = _reader(path)
    found: list[_Row] = []

    def add(number: int, value: Any, error: PreferenceDataError | None, place: str) -> None:
        prompt, candidates = None, []
        if error is None:
            try:
                prompt, candidates = _checked_row(value, drawn, prompted)
            except PreferenceDataError as problem:
                error = problem
        described = json.dumps([*origin, prompt, candidates, error and error.problem], default=str)
        digest = hashlib.sha256(described.encode()).hexdigest()[:16]
        if error is not None:
            error.source, error.row = str(path), place
        columns = value if isinstance(value, Mapping) else {}
        found.append(_Row(number, prompt, candidates, columns, None if error is None else str(error), digest))

    class Recorded(BadRows):
        def meet(self, error: PreferenceDataError, row: str, count: int = 1) -> None:
            add(int(row.split()[-1]), None, error, row)

    for number, value in reader(path, Recorded(str(path), "drop")):
        add(number, value, None, f"{unit} {number}")
    if not found:
        raise ValueError(f"{path}: there are no rows; expected at least one")
    return found


def _checked_row(value: Any, drawn: bool, prompted: bool) -> tuple[Any, list[Any]]:
    """Return the prompt and the candidates of a row, none where they are to be drawn."""
    from pfm.rows import PreferenceDataError, checked_prompt, conversation_text, is_blank, require, show

    if not isinstance(value, Mapping):
        raise PreferenceDataError(f"got {show(value)}; expected an object with columns")
    prompt = checked_prompt(require(value, "prompt"), "prompt")
    if prompted and is_blank(prompt):
        raise PreferenceDataError("the prompt is empty, and this flow was fitted with prompts", column="prompt")
    if drawn:
        return prompt, []
    column = "candidates" if value.get("candidates") is not None or value.get("output") is None else "output"
    given = require(value, column)
    if column == "candidates" and not isinstance(given, list | tuple):
        raise PreferenceDataError(f"got {show(given)}; expected a list of texts", column=column)
    texts = list(given) if column == "candidates" else [given]
    # Whole messages become the text that encoders read; what is no text at all the refiner drops and counts.
    return prompt, [conversation_text(text) if isinstance(text, list) else text for text in texts]


class _Results:
    """Is the file of results: appended to row by row, read back when a run is repeated.

    A line starts with the row's number and digest. The file is refused if it was made from other rows, by another
    flow or by something else, so that no run mixes with another and no file of the user is harmed.
    """

    START = b'{"pfm": {"row": '

    def __init__(self, path: Path, rows: Sequence[_Row]) -> None:
        self.path = path
        self.rows = rows
        self.refined = 0
        self._lines: list[int] = []  # numbers of the rows, line by line
        self._results: dict[int, dict[str, Any]] = {}
        if path.exists():
            self._recover()
        self._waiting = self.waiting()
        self._at = 0

    def __enter__(self) -> _Results:
        self._file = self.path.open("ab", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _recover(self) -> None:
        whole, newline, rest = self.path.read_bytes().rpartition(b"\n")
        digests = {row.number: row.digest for row in self.rows}
        for place, line in enumerate(whole.split(b"\n") if newline else [], 1):
            try:
                record = json.loads(line)
                number, digest = record["pfm"]["row"], record["pfm"]["input"]
                if digests.get(number) == digest:
                    self._note(number, record)
                    continue
                failed = record["error"] is not None
            except (ValueError, KeyError, TypeError):
                raise self._foreign(place) from None
            if not failed:
                raise ValueError(
                    f"{self.path} holds results of other rows, another flow or another generator (line {place}, "
                    f"row {number}): give another --out, or delete it to start again"
                )
            self._lines.append(number)  # its row has been corrected since
        if not (rest.startswith(self.START) or self.START.startswith(rest)):
            raise self._foreign(len(self._lines) + 1)
        if rest:  # half a line: the run was stopped while it was being written
            os.truncate(self.path, len(whole) + len(newline))

    def _foreign(self, place: int) -> ValueError:
        return ValueError(f"{self.path} is there and line {place} is no result of pfm refine: give another --out")

    def _note(self, number: int, record: Mapping[str, Any]) -> None:
        before, after = (record["probabilities"] or [None])[0], record["win_probability"]
        self._results[number] = {
            "error": record["error"] is not None,
            "changed": record["changed"],
            "b": None if before is None or after is None else (before, after),
        }
        self._lines.append(number)

    def waiting(self) -> list[_Row]:
        """List the rows that have no result yet, or one with an error that a second try may not meet."""
        return [
            row
            for row in self.rows
            if row.number not in self._results or (row.error is None and self._results[row.number]["error"])
        ]

    def add_up_to(self, row: _Row, result: Refinement) -> None:
        """Write the result of a row, and before it the errors of the bad rows that precede it."""
        self._write_bad(row)
        self._write(row, result)
        self.refined += 1
        self._at += 1

    def finish(self) -> None:
        """Write what is left, and put the lines in the order of the rows if a repeated row came out of it."""
        self._write_bad(None)
        order = [row.number for row in self.rows]
        if self._lines == order:
            return
        from pfm.rows import write_lines

        lines = self.path.read_text(encoding="utf-8").split("\n")
        latest = dict(zip(self._lines, lines, strict=False))
        write_lines(self.path, (latest[number] for number in order))

    def _write_bad(self, stop: _Row | None) -> None:
        while self._at < len(self._waiting) and self._waiting[self._at] is not stop:
            row = self._waiting[self._at]
            self._write(row, None)
            self._at += 1

    def _write(self, row: _Row, result: Refinement | None) -> None:
        record = _unusable(row) if result is None else _rounded(result.to_dict())
        columns = {name: value for name, value in row.columns.items() if name != "pfm"}
        line = {"pfm": {"row": row.number, "input": row.digest}, **columns, **record}
        rest = memoryview(_encoded_line(line))
        while rest:  # a write to a nearly full disk may take a part only
            rest = rest[self._file.write(rest) :]
        self._note(row.number, record)

    @property
    def errors(self) -> int:
        """Count the rows with an error."""
        return sum(result["error"] for result in self._results.values())

    @property
    def changed(self) -> int:
        """Count the rows whose text is another than the original."""
        return sum(result["changed"] for result in self._results.values())

    def mean_b(self) -> tuple[float, float] | None:
        """Give the mean win probability of originals and of results, or None if nothing was judged."""
        pairs = [result["b"] for result in self._results.values() if result["b"] is not None]
        if not pairs:
            return None
        before, after = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        return before, after

    def progress(self) -> str:
        """Say how far the run has come."""
        done = f"{len(self._results):,} of {len(self.rows):,} rows are in {self.path}"
        return f"{done}; run the same command again to go on."


def _unusable(row: _Row) -> dict[str, Any]:
    """Give the result of a bad row, in the columns of any other."""
    from pfm.refiner import Refinement

    prompt = row.columns.get("prompt")
    result = Refinement(prompt or "", "", "", [], float("nan"), [], -1, False, "no candidate", 0.0, 0, row.error)
    return result.to_dict()


def _rounded(record: dict[str, Any]) -> dict[str, Any]:
    """Round to the digits that do not depend on which rows were judged together."""

    def six(value: float | None) -> float | None:
        return None if value is None else round(value, 6)

    return record | {
        "win_probability": six(record["win_probability"]),
        "probabilities": [six(value) for value in record["probabilities"]],
        "seconds": round(record["seconds"], 3),
    }


def _encoded_line(record: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair in a column of the input
        return (json.dumps(record, default=str) + "\n").encode()


def _show_refined(session: _Session, results: _Results, earlier: int) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    kept = len(results.rows) - results.changed - results.errors
    lines = [("changed", f"{results.changed:,}"), ("kept", f"{kept:,}"), ("errors", f"{results.errors:,}")]
    b = results.mean_b()
    if b is not None:
        lines.append(("mean win probability", f"{b[0]:.3f} before, {b[1]:.3f} after"))
    if earlier:
        lines.append(("from an earlier run", f"{earlier:,}"))
    for name, value in lines:
        table.add_row(name, Text(value, "bold"))
    session.out.print(table)
    session.out.print(Text(f"wrote {results.path}", "dim"), soft_wrap=True)
    if results.errors:
        session.note(
            f"{results.errors:,} rows have errors, told in their column 'error'; a second run tries them again"
        )


@dataclass(frozen=True)
class _ScoredRow:
    prompt: Any
    candidates: list[str]
    scores: list[float]
    group: Any
    independent: float | None


def _read_scored(path: Path, on_bad_rows: str, *, prompted: bool) -> list[_ScoredRow]:
    from pfm.rows import BadRows, PreferenceDataError

    reader, unit = _reader(path)
    bad = BadRows(str(path), on_bad_rows)
    found: list[_ScoredRow] = []
    for number, value in reader(path, bad):
        try:
            found.append(_scored_row(value, prompted))
        except PreferenceDataError as error:
            bad.meet(error, f"{unit} {number}")
    bad.finish(len(found))
    return found


def _scored_row(value: Any, prompted: bool) -> _ScoredRow:
    from pfm.rows import PreferenceDataError, checked_response, conversation_text, require

    prompt, candidates = _checked_row(value, False, prompted)
    texts = [conversation_text(checked_response(text, "candidates")) for text in candidates]
    scores = require(value, "scores")
    if not isinstance(scores, list | tuple) or len(scores) != len(texts) or not texts:
        found = f"{len(scores)} scores" if isinstance(scores, list | tuple) else repr(scores)
        raise PreferenceDataError(f"got {found} for {len(texts)} candidates; expected one a candidate", column="scores")
    further = value.get("independent_score")
    return _ScoredRow(
        prompt,
        texts,
        [_score(score, "scores") for score in scores],
        value.get("group"),
        None if further is None else _score(further, "independent_score"),
    )


def _score(value: Any, column: str) -> float:
    from math import isfinite

    from pfm.rows import PreferenceDataError, show

    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise PreferenceDataError(f"got {show(value)}; expected a finite number", column=column)
    return float(value)


class _Recorded:
    """Stands for a refiner and a judge whose outputs, further draws and scores are already there."""

    def __init__(self, rows: Sequence[_ScoredRow], records: Sequence[Refinement]) -> None:
        self.rows = rows
        self.records = records
        self._next = iter(rows)

    def batch(self, prompts: Sequence[Any], *, progress: bool) -> list[Refinement]:
        return list(self.records)

    def candidates(self, prompts: Sequence[Any], n: int) -> list[list[str]]:
        return [[] if row.independent is None else ["(a further draw)"] for row in self.rows]

    def judge(self, prompt: Any, responses: list[str]) -> list[float]:
        """Give the scores of the next row: rows are judged in order."""
        row = next(self._next)
        return row.scores if row.independent is None else [*row.scores, row.independent]


def _report(
    rows: Sequence[_ScoredRow],
    records: Sequence[Refinement],
    training: EncodedPairs | None,
    encoder: Encoder,
    seed: int,
    progress: bool,
) -> Report:
    from pfm.evaluation import evaluate

    groups = [row.group for row in rows]
    options: dict[str, Any] = {
        "training": training,
        "encoder": None if training is None else encoder,
        "groups": None if None in groups else groups,
        "seed": seed,
        "progress": progress,
    }
    if all(row.independent is None for row in rows):
        return evaluate(list(records), scores=[row.scores for row in rows], **options)
    recorded = _Recorded(rows, records)
    return evaluate(recorded, [row.prompt for row in rows], judge=recorded.judge, **options)


def _warn_of_leaks(report: Report, rows: Sequence[_ScoredRow], training: PreferencePairs) -> None:
    from pfm.rows import conversation_text

    seen = set(training.prompts)
    leaked = sum(conversation_text(row.prompt) in seen for row in rows)
    if leaked:
        report.verdict.warnings.append(
            f"{leaked} of {len(rows)} prompts are among the training pairs too: figures on prompts that were trained "
            "on flatter the flow and the fitted baselines."
        )


from pfm import cli_label, cli_serve  # noqa: E402, F401 - they add their commands to app
