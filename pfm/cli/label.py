"""``pfm label``: judge candidates in pairs, and write preference rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from pfm.cli.generator import imported, make_generator
from pfm.cli.lines import LineFile
from pfm.cli.rows import PromptKey, find_reader, numbered_rows
from pfm.cli.session import SOME_FAILED, Json, Session, Traceback, guarded
from pfm.cli.shell import (
    BadRowsOption,
    EncoderOfFlow,
    NoProgress,
    OnBadRows,
    Reasoning,
    ReasoningOption,
    TrustEncoder,
    app,
    examples,
    load_flow,
)

if TYPE_CHECKING:
    from pfm.judges import Comparison, Judge, Verdict

_PANEL = "LLM judge"
PORTION = 64  # comparisons that an interrupt can cost


@app.command(
    epilog=examples(
        "pfm label candidates.jsonl --out pairs.jsonl --model gpt-4.1-mini",
        "pfm label candidates.jsonl --out pairs.jsonl --model qwen3 --base-url http://localhost:8000/v1",
        "pfm label candidates.jsonl --out pairs.jsonl --judge reward:OpenAssistant/reward-model-deberta-v3-large-v2",
        "pfm label candidates.jsonl --out pairs.jsonl --judge my_rules:score",
        "pfm label candidates.jsonl --out pairs.jsonl --model gpt-4.1-mini --flow flow/ --sure 0.95",
    )
)
def label(
    rows: Annotated[
        Path,
        typer.Argument(help="Rows with prompt and candidates, a list of two texts or more.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File of preference rows (.jsonl), one line per pair.")],
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="KIND:NAME",
            help="reward:NAME, a reward model's folder or name at the hub; pattern:REGEX, the more matches the better; "
            "or MODULE:NAME, a function (prompt, response) -> number or a judge, looked for in this folder first.",
            show_default="the language model below",
        ),
    ] = None,
    prompt_key: PromptKey = "prompt",
    max_pairs: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of pairs per row, drawn at random.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for drawing these pairs.")] = 0,
    model: Annotated[
        str | None, typer.Option(help="Judge with this model of an OpenAI-compatible server.", rich_help_panel=_PANEL)
    ] = None,
    local_model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Judge with this local Transformers model.", rich_help_panel=_PANEL),
    ] = None,
    generator: Annotated[
        str | None,
        typer.Option(metavar="MODULE:NAME", help="Judge with this function of a prompt.", rich_help_panel=_PANEL),
    ] = None,
    template: Annotated[
        str, typer.Option(help="File of the prompt, with {prompt}, {first} and {second}.", rich_help_panel=_PANEL)
    ] = "judge",
    rubric: Annotated[
        str, typer.Option(help="File with the criteria by which an answer is better.", rich_help_panel=_PANEL)
    ] = "rubric",
    flow: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a flow: a judge in both orders is asked a second time only where the first leaves the "
            "winner open. With --sure, pairs whose winner it is sure of are not asked for."
        ),
    ] = None,
    sure: Annotated[
        float | None,
        typer.Option(
            min=0.5,
            max=1,
            help="Win probability under --flow from which a pair is not judged, such as 0.95.",
            show_default="ask for all",
        ),
    ] = None,
    audit: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of these pairs to judge anyway, to measure the flow's errors."),
    ] = 0.1,
    encoder: EncoderOfFlow = None,
    trust_encoder: TrustEncoder = False,
    one_order: Annotated[
        bool,
        typer.Option(
            "--one-order", help="Use one order only: half the calls, but position bias.", rich_help_panel=_PANEL
        ),
    ] = False,
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--parameter",
            "-p",
            metavar="KEY=VALUE",
            help="A parameter of the model; may be repeated.",
            show_default="temperature=0",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Address of the server.",
            show_default="OPENAI_BASE_URL, else OpenAI",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Environment variable that holds the key.",
            show_default="OPENAI_API_KEY",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests.", rich_help_panel=_PANEL)] = 8,
    max_calls: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many requests.", rich_help_panel=_PANEL)
    ] = None,
    reasoning: ReasoningOption = Reasoning.aside,
    on_bad_rows: BadRowsOption = OnBadRows.stop,
    no_progress: NoProgress = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Have a judge compare the candidates of each row, and write preference rows for [cyan]pfm fit[/cyan].

    Every two different candidates of a row make a pair, with the probability that the chosen one is better; a
    language model is asked in both orders. Run the same command again to go on after Ctrl-C, or to ask again for
    pairs that got no verdict.
    Exit code 3: some pairs have no verdict; they are not in the file.
    """
    with guarded(traceback, as_json) as session:
        asked = {"--generator": generator, "--model": model, "--local-model": local_model}
        named = [option for option, value in asked.items() if value is not None]
        if (judge is None) == (not named):
            raise ValueError(
                "give the judge: --judge, or a language model by --model, --local-model or --generator"
                if judge is None
                else f"--judge and {named[0]} name two judges: give one"
            )
        if judge is not None:
            made = _judge(judge)
        else:
            from pfm.judges import LLMJudge

            parameters = list(parameter or (() if generator is not None else ("temperature=0",)))
            source = make_generator(
                generator=generator,
                model=model,
                local_model=local_model,
                parameters=parameters,
                no_cache=True,  # the file of labels is what is kept: an answer that cannot be read is asked for again
                base_url=base_url,
                api_key_env=api_key_env,
                concurrency=concurrency,
                max_calls=max_calls,
            )
            made = LLMJudge(
                source,
                template=template,
                rubric=rubric,
                both_orders=not one_order,
                temperature=0.0 if generator is not None else None,
                name=model or local_model or generator,
            )
        if sure is not None and flow is None:
            raise ValueError("--sure needs --flow: the flow whose b is sure")
        if flow is not None:
            from pfm.judges import SparingJudge, pair_probability

            known = pair_probability(*load_flow(flow, encoder, trust_encoder))
            made = SparingJudge(made, known, sure=1.0 if sure is None else sure, audit=audit, seed=seed)
        if reasoning is Reasoning.keep:
            made.reasoning = "keep"
        pairs = list(_pairs(rows, on_bad_rows.value, made, max_pairs, seed, prompt_key))
        if not pairs:
            raise ValueError(f"{rows}: no row has two different candidates")
        if out.exists() and out.samefile(rows):
            raise ValueError(f"--out must be another file than the input {rows}")
        session.make_folder(out.parent)
        with _Labels(out, pairs) as labels:
            session.kept = labels.progress
            earlier = labels.written
            labels.run(made, progress=not no_progress)
        _show(session, labels, made, earlier)
        if labels.missing:
            raise typer.Exit(SOME_FAILED)


def _judge(name: str) -> Judge:
    from pfm.judges import Judge, RewardModelJudge, ScriptedJudge

    kind, _, rest = name.partition(":")
    if kind == "reward" and rest:
        return RewardModelJudge(rest)
    if kind == "pattern" and rest:
        return ScriptedJudge(rest)
    try:
        found = imported(name)
    except ValueError as error:
        raise ValueError(str(error).replace("--generator", "--judge")) from None
    return found if isinstance(found, Judge) else ScriptedJudge(found, name=name)


@dataclass(frozen=True)
class _Pair:
    """Holds two candidates of a row; ``digest`` changes with all that their label depends on."""

    row: int
    places: tuple[int, int]
    comparison: Comparison
    columns: Mapping[str, Any]
    digest: str

    @property
    def key(self) -> tuple[int, int, int]:
        return (self.row, *self.places)


def _pairs(
    path: Path, on_bad_rows: str, judge: Judge, limit: int | None, seed: int, prompt_key: str
) -> Iterator[_Pair]:
    """Read the rows, and yield their pairs in order."""
    from pfm.data.errors import BadRows, PreferenceDataError, show
    from pfm.judges.base import candidate_pairs

    unit = find_reader(path)[1]
    bad = BadRows(str(path), on_bad_rows)
    origin = judge.describe() | ({"reasoning": "keep"} if judge.reasoning == "keep" else {})
    kept = 0
    for number, value in numbered_rows(path, bad, prompt_key):
        try:
            if not isinstance(value, Mapping):
                raise PreferenceDataError(f"got {show(value)}; expected an object with columns")
            found = list(candidate_pairs(value, limit, (seed, number), judge.reasoning))
        except PreferenceDataError as error:
            bad.meet(error, f"{unit} {number}")
            continue
        kept += 1
        for places, comparison in found:
            described = json.dumps([origin, *comparison], default=str)
            digest = hashlib.sha256(described.encode(errors="surrogatepass")).hexdigest()[:16]
            yield _Pair(number, places, comparison, value, digest)
    bad.finish(kept)


class _Labels(LineFile):
    """The file of labels, one line per pair with a verdict; a line starts with the pair's row, places and digest."""

    RESULT = "label of pfm label"
    ORIGIN = "labels of other rows or by another judge"

    def __init__(self, path: Path, pairs: Sequence[_Pair]) -> None:
        self.pairs = pairs
        self.ties = self.left = 0
        self._digests = {pair.key: pair.digest for pair in pairs}
        super().__init__(path)

    def meet(self, record: Mapping[str, Any]) -> tuple[int, ...] | None:
        key = (record["pfm"]["row"], *record["pfm"]["pair"])
        self.ties += record["probability"] == 0.5
        return key if self._digests.get(key) == record["pfm"]["input"] else None

    @property
    def written(self) -> int:
        """Count the pairs that have a label."""
        return len(self.keys)

    @property
    def missing(self) -> int:
        """Count the pairs without one."""
        return len(self.pairs) - len(self.keys) - self.left

    def run(self, judge: Judge, *, progress: bool) -> None:
        """Judge the pairs that wait, portion by portion, and write each portion's labels at once."""
        from tqdm.auto import tqdm

        done = set(self.keys)
        waiting = [pair for pair in self.pairs if pair.key not in done]
        make_bar: Callable[..., Any] = tqdm if progress else partial(tqdm, disable=True)
        with make_bar(total=len(self.pairs), initial=self.written, desc="Labelling", unit="pair") as bar:
            for start in range(0, len(waiting), PORTION):
                some = waiting[start : start + PORTION]
                for pair, verdict in zip(some, judge.compare([pair.comparison for pair in some]), strict=True):
                    if verdict.by_model:
                        self.left += 1
                    elif verdict.given:
                        self._write(pair, verdict)
                bar.update(len(some))
        written = set(self.keys)
        self.put_in_order([pair.key for pair in self.pairs if pair.key in written])

    def progress(self) -> str:
        """Say how far the run has come."""
        done = f"{self.written:,} of {len(self.pairs):,} pairs are in {self.path}"
        return f"{done}; run the same command again to go on."

    def _write(self, pair: _Pair, verdict: Verdict) -> None:
        from pfm.judges.base import preference_row

        made = preference_row(pair.columns, pair.comparison, verdict)
        made["probability"] = round(made["probability"], 6)
        self.append(pair.key, {"pfm": {"row": pair.row, "pair": list(pair.places), "input": pair.digest}, **made})
        self.ties += verdict.probability == 0.5


def _show(session: Session, labels: _Labels, judge: Judge, earlier: int) -> None:
    from pfm.judges import SparingJudge

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    lines = [("labelled", f"{labels.written:,}"), ("of these ties", f"{labels.ties:,}")]
    lines.append(("without verdict", f"{labels.missing:,}"))
    if earlier:
        lines.append(("from an earlier run", f"{earlier:,}"))
    spared = judge.tally if isinstance(judge, SparingJudge) else None
    if spared is not None:
        lines.append(("left to the flow", f"{labels.left:,}"))
        if rate := spared.error_rate:
            share, low, high = rate
            told = f"{spared.wrong:,} of {spared.audited:,} audited ({share:.0%}, 95% interval {low:.0%} to {high:.0%})"
            lines.append(("where the flow is wrong", told))
        lines.append(("questions to the judge", f"{spared.questions:,} for {spared.pairs:,} pairs"))
    tally = getattr(judge.judge_itself if isinstance(judge, SparingJudge) else judge, "tally", None)
    if tally is not None and tally.calls:
        found = tally.to_dict()
        lines += [("answers not read", f"{tally.unread:,}"), ("answers that never came", f"{tally.failed:,}")]
        if found["position_bias"] is not None:
            lines.append(("lean to the first place", f"{found['position_bias']:+.2f} (0: none, 1: always)"))
        if found["consistency"] is not None:
            lines.append(("both orders agree", f"{found['consistency']:.0%}"))
    for name, value in lines:
        table.add_row(name, Text(value, "bold"))
    session.out.print(table)
    session.wrote(labels.path)
    session.result(
        {
            "file": labels.path,
            "pairs": len(labels.pairs),
            "labelled": labels.written,
            "ties": labels.ties,
            "without_verdict": labels.missing,
            "from_an_earlier_run": earlier,
            "left_to_the_flow": None if spared is None else labels.left,
            "audit": spared,
            "judge": None if tally is None or not tally.calls else tally.to_dict(),
        }
    )
    if labels.missing:
        session.note(f"{labels.missing:,} pairs got no verdict; a second run asks for them again")
