"""``pfm refine``: pick the best candidate of every row, or write a better one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from pfm._internal.files import FileInUseError
from pfm.cli.decoder import DecoderName, DecoderOption, DecoderSettings, ExemplarsOption, make_decoder
from pfm.cli.generator import (
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
    MostCandidates,
    NoCache,
    ParameterOption,
    PerCall,
    Retries,
    SpendOption,
    Timeout,
    candidate_count,
    describe_generator,
    make_generator,
    spend_of,
)
from pfm.cli.lines import LineFile
from pfm.cli.rows import Row, read_rows
from pfm.cli.session import SOME_FAILED, Json, Session, Traceback, guarded
from pfm.cli.shell import (
    EncoderOfFlow,
    FlowFolder,
    NoProgress,
    Reasoning,
    ReasoningOption,
    TrustEncoder,
    app,
    examples,
    fingerprint,
    load_flow,
    load_stopping,
)

if TYPE_CHECKING:
    from pfm.refiner import Refinement, Refiner


@app.command(
    epilog=examples(
        "pfm refine outputs.jsonl --flow flow/ --out refined.jsonl",
        "pfm refine answers/ --flow flow/ --out refined/",
        "pfm refine prompts.jsonl --flow flow/ --out refined.jsonl --model qwen3 --base-url http://localhost:8000/v1",
        "pfm refine prompts.jsonl --flow flow/ --out refined.jsonl --generator my_bot:reply -n 8",
        "pfm refine prompts.jsonl --flow flow/ --out refined.jsonl --model qwen3 -n auto --max-n 16",
        "pfm refine prompts.jsonl --flow flow/ --out new.jsonl --model qwen3 --decoder rewrite --exemplars pairs.jsonl",
    )
)
def refine(
    rows: Annotated[
        Path,
        typer.Argument(
            help="Rows with prompt and candidates (a list, the original first), or prompt and output; or a folder of "
            "such files.",
            show_default=False,
        ),
    ],
    flow: FlowFolder,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="File of results (.jsonl), one line per row; for a folder, a folder of them."),
    ],
    generator: GeneratorOption = None,
    model: ModelOption = None,
    local_model: LocalModelOption = None,
    n: CandidateCount = "8",
    max_n: MostCandidates = None,
    spend: SpendOption = None,
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
    decoder: DecoderOption = DecoderName.select,
    exemplars: ExemplarsOption = None,
    settings: DecoderSettings = None,
    reasoning: ReasoningOption = Reasoning.aside,
    encoder: EncoderOfFlow = None,
    trust_encoder: TrustEncoder = False,
    no_progress: NoProgress = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Pick the best candidate of every row, or keep the original.

    The candidates are read from the rows, or drawn from the generator that an option names; with
    [cyan]--decoder rewrite[/cyan] that generator also revises the best one.
    Results are written as they come, with all columns of their rows.
    Run the same command again to go on after Ctrl-C, or to retry rows with errors.
    Of a folder each file has a file of results; start the command several times to refine several files at once.
    Exit code 3: some rows have errors, see their column [cyan]error[/cyan].
    """
    with guarded(traceback, as_json) as session:
        count = candidate_count(n)
        price = spend_of(spend)
        fitted, with_encoder = load_flow(flow, encoder, trust_encoder)
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
        made, depends = make_decoder(
            decoder, settings or (), exemplars, with_encoder, drawn=drawn, progress=not no_progress
        )
        if reasoning is Reasoning.keep:
            depends = [*depends, "reasoning kept"]
        rule = load_stopping(flow) if count == "auto" else None
        if count == "auto" and rule is None:
            raise ValueError(
                f"-n auto needs a stopping rule: make one with pfm calibrate SCORED --flow {flow}, or give -n 8"
            )
        auto = {"max_n": max_n, "spend": price, "stopping": rule}
        refiner = wrap(source, fitted, encoder=with_encoder, decoder=made, n=count, reasoning=reasoning.value, **auto)
        how = count if refiner.plan is None else [count, refiner.n, price, refiner.plan.stopping.to_dict()]
        origin = [
            fingerprint(flow),
            encoder,
            *([describe_generator(source, generator), how] if drawn else []),
            *depends,
        ]
        prompted = bool(fitted.metadata.get("context_dimension"))
        shown = not no_progress
        found, failed = [], False
        for source_file, target in _files(rows, out):
            try:
                asked = read_rows(source_file, origin, drawn=drawn, prompted=prompted)
            except ValueError as error:
                if source_file == rows:
                    raise
                session.note(f"not refined: {error}")
                failed = True
                continue
            if target.exists() and target.samefile(source_file):
                raise ValueError(f"--out must be another file than the input {source_file}")
            if source_file == rows:
                _refuse_hopeless(asked, drawn)
            session.make_folder(target.parent)
            try:
                results = _Results(target, asked)
            except FileInUseError as error:
                if source_file == rows:
                    raise
                session.note(f"{error.args[0].partition(':')[0]}: left to it")
                continue
            with results:
                session.kept = results.progress
                waiting = results.waiting()
                _refine_rows(refiner, results, asked, waiting, drawn=drawn, progress=shown)
            found.append(_show_refined(session, results, len(asked) - len(waiting)))
        session.result({"files": found} if rows.is_dir() else found[0])
        if failed or any(each["errors"] for each in found):
            raise typer.Exit(SOME_FAILED)


def _refuse_hopeless(asked: Sequence[Row], drawn: bool) -> None:
    """Stop before anything is written where no row can be refined."""
    if any(row.error is None for row in asked):
        return
    lacking = not drawn and all("candidates" not in row.columns and "output" not in row.columns for row in asked)
    way_out = (
        "; give --model NAME to draw candidates, or rows with a column 'candidates' or 'output'" if lacking else ""
    )
    count = f"none of the {len(asked):,} rows" if len(asked) > 1 else "the only row"
    verb = "can" if len(asked) > 1 else "cannot"
    raise ValueError(f"{count} {verb} be refined, and nothing was written. {asked[0].error}{way_out}")


def _files(rows: Path, out: Path) -> list[tuple[Path, Path]]:
    """Return the files to refine, each with its file of results.

    Raises:
        ValueError: a folder holds no file of rows, two of its files would have one file of results, or ``out`` is it.
    """
    if not rows.is_dir():
        return [(rows, out)]
    from pfm.data.folders import row_files
    from pfm.data.readers import without_compression

    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} must be a folder, as {rows} is one")
    if out.exists() and out.samefile(rows):
        raise ValueError(f"--out must be another folder than the input {rows}")
    found: dict[Path, Path] = {}
    for path in row_files(rows):
        inner = without_compression(path)
        target = out / f"{inner.stem}.jsonl"
        if target in found:
            raise ValueError(f"{found[target].name} and {path.name} would both be refined to {target}: rename one")
        found[target] = path
    return [(path, target) for target, path in found.items()]


def _refine_rows(
    refiner: Refiner, results: _Results, asked: Sequence[Row], waiting: Sequence[Row], *, drawn: bool, progress: bool
) -> None:
    """Refine the rows that wait, writing each result as it comes."""
    sound = [row for row in waiting if row.error is None]
    prompts = [row.prompt for row in sound]

    def keep(result: Refinement) -> None:
        results.add_up_to(sound[results.refined], result)

    if drawn:
        from pfm.generators.base import first_samples

        # By its place among all rows, so that a prompt that comes twice gets the same draws in a second run.
        whole = [row for row in asked if row.error is None]
        numbers = first_samples([row.prompt for row in whole], refiner.n)
        first = {row.number: number for row, number in zip(whole, numbers, strict=True)}
        start = [first[row.number] for row in sound]
        refiner.batch(prompts, progress=progress, on_result=keep, start=start)
    else:
        refiner.refine([row.candidates for row in sound], prompts, progress=progress, on_result=keep)
    results.finish()


class _Results(LineFile):
    """The file of results, one line per row; a line starts with the row's number and digest.

    A row with an error is tried again in a second run.
    """

    RESULT = "result of pfm refine"
    ORIGIN = "results of other rows, another flow, generator or decoder"

    def __init__(self, path: Path, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.refined = 0
        self._digests = {row.number: row.digest for row in rows}
        self._results: dict[int, dict[str, Any]] = {}
        super().__init__(path)
        self._waiting = self.waiting()
        self._at = 0

    def meet(self, record: Mapping[str, Any]) -> int | None:
        number, digest = record["pfm"]["row"], record["pfm"]["input"]
        if self._digests.get(number) == digest:
            self._note(number, record)
            return number
        # an error's row may have been corrected since
        return number if record["error"] is not None else None

    def _note(self, number: int, record: Mapping[str, Any]) -> None:
        before, after = (record["probabilities"] or [None])[0], record["win_probability"]
        self._results[number] = {
            "error": record["error"],
            "changed": record["changed"],
            "draws": (record.get("spent") or {}).get("draws"),
            "b": None if before is None or after is None else (before, after),
        }

    def waiting(self) -> list[Row]:
        """List the rows that have no result yet, or one with an error that a second try may not meet."""
        return [
            row
            for row in self.rows
            if row.number not in self._results or (row.error is None and self._results[row.number]["error"] is not None)
        ]

    def add_up_to(self, row: Row, result: Refinement) -> None:
        """Write the result of a row, and before it the errors of the bad rows that precede it."""
        self._write_bad(row)
        self._write(row, result)
        self.refined += 1
        self._at += 1

    def finish(self) -> None:
        """Write what is left, and put the lines in the order of the rows if a repeated row came out of it."""
        self._write_bad(None)
        self.put_in_order([row.number for row in self.rows])

    def _write_bad(self, stop: Row | None) -> None:
        while self._at < len(self._waiting) and self._waiting[self._at] is not stop:
            row = self._waiting[self._at]
            self._write(row, None)
            self._at += 1

    def _write(self, row: Row, result: Refinement | None) -> None:
        record = _unusable(row) if result is None else _rounded(result.to_dict())
        columns = {name: value for name, value in row.columns.items() if name != "pfm"}
        self.append(row.number, {"pfm": {"row": row.number, "input": row.digest}, **columns, **record})
        self._note(row.number, record)

    @property
    def errors(self) -> int:
        """Count the rows with an error."""
        return sum(result["error"] is not None for result in self._results.values())

    @property
    def most_frequent_error(self) -> str:
        """Return the error that most rows have, and how many others there are."""
        count = Counter(result["error"] for result in self._results.values() if result["error"] is not None)
        (error, often), *rest = count.most_common()
        others = f" ({often:,} rows; {sum(count.values()) - often:,} have other errors)" if rest else ""
        return f"{error}{others}"

    @property
    def changed(self) -> int:
        """Count the rows whose text is another than the original."""
        return sum(result["changed"] for result in self._results.values())

    def mean_b(self) -> tuple[float, float] | None:
        """Return the mean win probability of originals and of results, or None if nothing was judged."""
        pairs = [result["b"] for result in self._results.values() if result["b"] is not None]
        if not pairs:
            return None
        before, after = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        return before, after

    def mean_draws(self) -> float | None:
        """Return the mean number of draws of ``-n auto``, or None."""
        draws = [result["draws"] for result in self._results.values() if result["draws"] is not None]
        return sum(draws) / len(draws) if draws else None

    def progress(self) -> str:
        """Say how far the run has come."""
        done = f"{len(self._results):,} of {len(self.rows):,} rows are in {self.path}"
        return f"{done}; run the same command again to go on."


def _unusable(row: Row) -> dict[str, Any]:
    """Return the result of a bad row, in the columns of any other."""
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


def _show_refined(session: Session, results: _Results, earlier: int) -> dict[str, Any]:
    """Print what became of the rows of a file, and return it as JSON values."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    kept = len(results.rows) - results.changed - results.errors
    lines = [("changed", f"{results.changed:,}"), ("kept", f"{kept:,}"), ("errors", f"{results.errors:,}")]
    b = results.mean_b()
    if b is not None:
        lines.append(("mean win probability", f"{b[0]:.3f} before, {b[1]:.3f} after"))
    draws = results.mean_draws()
    if draws is not None:
        lines.append(("draws a prompt", f"{draws:.2f} on average"))
    if earlier:
        lines.append(("from an earlier run", f"{earlier:,}"))
    for name, value in lines:
        table.add_row(name, Text(value, "bold"))
    session.out.print(table)
    session.wrote(results.path)
    if results.errors:
        session.note(
            f"{results.errors:,} rows have errors, given in their column 'error'; a second run tries them again. "
            f"The most frequent: {results.most_frequent_error}"
        )
    return {
        "file": results.path,
        "rows": len(results.rows),
        "changed": results.changed,
        "kept": kept,
        "errors": results.errors,
        "win_probability": None if b is None else {"before": b[0], "after": b[1]},
        "draws_per_prompt": draws,
        "from_an_earlier_run": earlier,
    }
