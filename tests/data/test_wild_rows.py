"""Rows as people have them: each file of ``wild_rows`` gives the right pairs, or the error that names the cause."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pfm.cli import app
from pfm.data import EncodedPairs, PreferenceDataError, PreferencePairs
from pfm.data.errors import BadRows
from pfm.data.readers import reader_for
from pfm.encoders import SurfaceEncoder

FOLDER = Path(__file__).parent / "wild_rows"


@dataclass(frozen=True)
class Wild:
    """Hold what a file must give: pairs (prompt, chosen, rejected) and a layout, or an error."""

    pairs: list[tuple[str, str, str]] = field(default_factory=list)
    layout: str = "standard (prompt)"
    error: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    prompts: int | None = None
    weight: list[float] | None = None
    group: list[Any] | None = None
    #: False: the error is about the file or the row's place in it, or a table cannot hold the rows.
    elsewhere: bool = True


BEES = ("How do bees find home?", "Well, they read the sun's place.", "Well, by luck.")
BREAD = ("Why does bread rise?", "Well, yeast makes gas.", "Well, it is warm.")
DEW = ("What is dew?", "Water out of cool air.", "Rain.")
THREE = [BEES, BREAD, DEW]
TREES = [("a tree, please", "Oak; or ash", "Table"), ("a fish", "Pike", "Oak, again")]
WEIGHTS = [2.0, 1.5]
TURNS = "conversations (first turns shared by chosen, rejected)"
ROME = '{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}'
TEXAS = '{"name": "weather", "arguments": "{\\"city\\": \\"Roma, Texas\\"}"}'
GARDEN = "\n\nHuman: How do I start?\n\nAssistant: With what?\n\nHuman: A garden.\n\nAssistant:"

WILD = {
    # a prompt under another name
    "question.jsonl": Wild(THREE, "question (question)"),
    "orca.jsonl": Wild(
        [("system: Answer a child.\nuser: " + BEES[0], *BEES[1:]), BREAD, DEW],
        "question (question); Orca (system, question)",
    ),
    "alpaca.json": Wild(
        [
            ("Translate to German.\ngood evening", "Guten Abend", "Gute Nacht"),
            (
                "system: Be brief.\nuser: Hello\nassistant: Hi!\nuser: Name a hill.\nassistant: Brocken.\n"
                "user: Name a river.",
                "Elbe",
                "It is hard to say.",
            ),
        ],
        "Alpaca (input, instruction); Alpaca (system, history, instruction)",
    ),
    "sharegpt.json": Wild(
        [
            (
                "system: You repair clocks.\nuser: It stopped.\nassistant: Since when?\nuser: Monday.",
                "Open the back first.",
                "Buy another.",
            ),
            ("It ticks loudly.", "Oil the train.", "So what."),
        ],
        "ShareGPT (system, conversations); ShareGPT (conversations)",
    ),
    "ultrafeedback_binarized.jsonl": Wild(THREE, "standard (prompt, repeated in chosen, rejected)"),
    "ultrafeedback.jsonl": Wild(
        [
            (BEES[0], "By smell.", "No idea."),
            (BEES[0], "By the sun.", "No idea."),
            (BEES[0], "By the sun.", "By smell."),
        ],
        "UltraFeedback (instruction, completions)",
    ),
    "shp.jsonl": Wild(
        [
            ("My bread is flat. Why?", "Old yeast.", "Throw it away."),
            ("Which flour for pizza?", "A strong one.", "Any."),
        ],
        "SHP (history, human_ref_A, human_ref_B, labels)",
    ),
    "openai.jsonl": Wild(
        [("Is it cold outside?", "Two degrees, so yes.", "Hm.")],
        "OpenAI (input, preferred_output, non_preferred_output)",
    ),
    "messages.jsonl": Wild(
        [
            (
                f"user: How warm is it in Rome?\nassistant: {ROME}\ntool: 24",
                "It is 24 degrees.",
                "Look outside.",
            )
        ],
        "messages (messages)",
    ),
    "query.csv": Wild([("name a tree", "Oak", "Table"), ("name a fish", "Pike", "Oak")], "query (query)"),
    "other_name.jsonl": Wild(
        error="there is no column 'prompt', and 'user_turn' may hold the prompts; columns found: 'user_turn', "
        "'chosen', 'rejected', 'model'; name the one that does, as in "
        "prompt_key='user_turn', or say that none does with "
        "prompt_key=None"
    ),
    "other_name.jsonl named": Wild(THREE, "named column (user_turn)", options={"prompt_key": "user_turn"}),
    "other_name.jsonl none": Wild(
        [("", *BEES[1:]), ("", *BREAD[1:]), ("", *DEW[1:])],
        "no prompts (chosen, rejected)",
        options={"prompt_key": None},
    ),
    "two_names.jsonl": Wild(error="'question' and 'instruction' may hold the prompts"),
    "two_names.jsonl named": Wild(THREE, "question (question)", options={"prompt_key": "question"}),
    "hole.jsonl": Wild(error="line 2, column 'prompt': the column is missing", elsewhere=False),
    "empty_prompts.jsonl": Wild([BEES, ("", *BREAD[1:]), ("", *DEW[1:])]),
    "forms.jsonl": Wild(
        [
            ("What is a café?", "good 0", "bad 0"),
            ("what is a café?  ", "good 1", "bad 1"),
            ("What is a cafe\u0301?\n", "good 2", "bad 2"),
            ("Ｗｈａｔ is\u00a0a café？", "good 3", "bad 3"),
            ("What is a bar?", "good 4", "bad 4"),
        ],
        prompts=2,
    ),
    # a prompt in the responses, or none
    "first_words.jsonl": Wild([("", *BEES[1:]), ("", *BREAD[1:]), ("", *DEW[1:])], "no prompts (chosen, rejected)"),
    "openings.jsonl": Wild(
        [("The sky at noon is", " blue.", " black."), ("My old dog likes", " bones.", " tax."), ("", "Oak", "Table")],
        "implicit prompt (opening shared by chosen, rejected)",
    ),
    "hh.jsonl": Wild(
        [
            (GARDEN, " Well, dig first.", " Well, give up."),
            (
                "\n\nHuman: Is it late?\n\nAssistant:",
                " Well, it is noon.",
                " Well, it is noon. I think. Ask me something else.",
            ),
            ("\n\nHuman: Is it  late?\n\nAssistant:", " Well, no.", " Well, I cannot tell."),
        ],
        "HH transcripts (Human: and Assistant: in chosen, rejected)",
        prompts=2,
    ),
    "hh_prompt.jsonl": Wild(
        [("\n\nHuman: How do I start?\n\nAssistant:", " Dig.", " Sit.")],
        "standard (prompt, repeated in chosen, rejected)",
    ),
    "hh_apart.jsonl": Wild(
        error="line 2: chosen is str '\\n\\nHuman: I...sistant: Dig.' and rejected is str "
        "'\\n\\nHuman: I...sistant: Sit.'; expected transcripts that are the same up to "
        "an 'Assistant:', as in most other rows",
        elsewhere=False,
    ),
    # conversations as text
    "repr.csv": Wild(THREE, TURNS),
    "json_text.jsonl": Wild(THREE, TURNS),
    "json_twice.jsonl": Wild(THREE, TURNS),
    "numpy_repr.csv": Wild(THREE, TURNS),
    "conversation_column.csv": Wild([("Hi, you", "Hello, you", "What")]),
    "half_text.jsonl": Wild(
        error="line 2, column 'chosen': got str '[{\"role\": \"a...Not plain.\"}]', and 1 of the 3 strings in this "
        "column are conversations written as text; expected all or none of them: write "
        "conversations as lists of messages",
        elsewhere=False,
    ),
    "cut_text.csv": Wild(error="row 2 (line 3), column 'rejected': got str", elsewhere=False),
    "json_answer.jsonl": Wild(
        [("Write the settings as JSON.", '{"name": "lamp", "on": true}', '{"name": "lamp", ')],
    ),
    # content that is no string
    "tool_answers.jsonl": Wild([("How warm is it in Rome?", ROME, TEXAS)]),
    "parts.jsonl": Wild([("Look:\ntwo lines", "Yes.", "No.")]),
    "image.jsonl": Wild(
        error="column 'prompt': part 2 of turn 1 is of type 'image_url', which is no text; expected parts of type "
        "'text'"
    ),
    # groups, labels, numbers
    "groups.jsonl": Wild(
        [(name, "x", "y") for name in "abcdef"], group=[None, None, None, None, 0.2, 0.9], elsewhere=False
    ),
    "liked.jsonl": Wild([("Name a tree.", "Oak", "Table")], weight=[2.5]),
    "neutral.jsonl": Wild(
        error="column 'label': got str 'neutral'; expected true or false, or a word for one of them such as "
        "'liked'/'disliked', 'yes'/'no', 'good'/'bad'"
    ),
    "strings.jsonl": Wild([("p", "x", "y")], weight=[0.5], group=["1"]),
    # spreadsheets
    "semicolons.csv": Wild(TREES, weight=WEIGHTS),
    "sep_line.csv": Wild(TREES, weight=WEIGHTS),
    "excel_unicode.csv": Wild(TREES, weight=WEIGHTS),
    "big_endian.csv": Wild(TREES, weight=WEIGHTS),
    "tabs.tsv": Wild(TREES, weight=WEIGHTS),
    "pandas_index.csv": Wild(TREES, weight=WEIGHTS),
    "trailing.csv": Wild(TREES, weight=WEIGHTS),
    "spaces.csv": Wild(TREES, weight=WEIGHTS),
    "no_mark.csv": Wild(error="as UTF-16 without a byte order mark does; save the text as UTF-8", elsewhere=False),
    "unnamed.csv": Wild(
        error="row 1 (line 2): cell 4 holds 'but why', and its column has no name; name it in the header, or put "
        "quotes around commas in texts",
        elsewhere=False,
    ),
    "decimal_comma.csv": Wild(
        error="row 1 (line 2), column 'weight': got str '0,5'; expected a finite number ≥ 0 with a decimal point",
        elsewhere=False,
    ),
    "latin1.csv": Wild(
        error="line 2: not valid UTF-8: byte 0xe9 at byte offset 30; save the text as UTF-8", elsewhere=False
    ),
}


def path_of(name: str) -> Path:
    return FOLDER / name.split()[0]


def check(pairs: PreferencePairs, wild: Wild) -> None:
    assert list(zip(pairs.prompts, pairs.chosen, pairs.rejected, strict=True)) == wild.pairs
    assert pairs.layout == wild.layout
    assert pairs.weight == wild.weight
    assert pairs.group == wild.group
    prompts = len({prompt for prompt, _, _ in wild.pairs}) if wild.prompts is None else wild.prompts
    assert pairs.summary().prompts == prompts


def rows_of(path: Path) -> list[Any]:
    return [row for _, row in reader_for(path)(path, BadRows(str(path), "raise"))]


def test_every_file_of_the_corpus_is_in_the_table():
    assert {path_of(name).name for name in WILD} == {path.name for path in FOLDER.iterdir()}


@pytest.mark.parametrize("name", WILD)
def test_python_reads_it_or_names_the_cause(name):
    wild, path = WILD[name], path_of(name)
    if wild.error is None:
        check(PreferencePairs.from_file(path, **wild.options), wild)
        return
    with pytest.raises(PreferenceDataError) as caught:
        PreferencePairs.from_file(path, **wild.options)
    assert wild.error in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", WILD)
def test_the_command_line_reads_it_or_names_the_cause(name, tmp_path):
    wild = WILD[name]
    options = ["--prompt-key", wild.options["prompt_key"] or ""] if wild.options else []
    # A share that cannot be held out ends the command after it has read and described the rows.
    command = ["fit", str(path_of(name)), "--out", str(tmp_path / "flow"), "--held-out", "2", *options]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "400"})
    shown = " ".join(done.output.split())
    assert done.exit_code != 0
    assert not (tmp_path / "flow").exists()
    if wild.error is None:
        assert "--held-out must be a share of the prompts" in shown
        assert re.search(rf"rows\W+{len(wild.pairs)}\b", shown)
        assert wild.layout in shown
    else:
        error = wild.error.replace("prompt_key='user_turn'", "--prompt-key user_turn")
        assert error.replace("prompt_key=None", "--prompt-key ''") in shown


@pytest.mark.parametrize("name", [name for name, wild in WILD.items() if wild.elsewhere])
def test_datasets_parquet_and_dictionaries_give_the_same(name, tmp_path):
    datasets = pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    wild, rows = WILD[name], rows_of(path_of(name))
    columns = dict.fromkeys(column for row in rows for column in row)
    rows = [dict.fromkeys(columns) | row for row in rows]  # a table has all columns in all rows
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    readers = [
        lambda: PreferencePairs.from_rows(rows, **wild.options),
        lambda: PreferencePairs.from_dataset(datasets.Dataset.from_list(rows), **wild.options),
        lambda: PreferencePairs.from_parquet(tmp_path / "rows.parquet", **wild.options),
    ]
    for read in readers:
        if wild.error is None:
            check(read(), wild)
        else:
            with pytest.raises(PreferenceDataError, match=re.escape(wild.error)):
                read()


def message_of(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# --- what a file cannot show --------------------------------------------------------------------------------------


def labelled(names):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        prompt=datasets.Value("string"), completion=datasets.Value("string"), label=datasets.ClassLabel(names=names)
    )
    rows = {"prompt": ["p", "p"], "completion": ["Oak", "Table"], "label": [0, 1]}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["liked", "disliked"], "Oak"),
        (["disliked", "liked"], "Table"),
        (["Yes", "No"], "Oak"),
        (["bad", "good"], "Table"),
        (["thumbs up", "thumbs-down"], "Oak"),
        (["0", "1"], "Table"),
        (["neutral", "liked"], None),
        (["A", "B"], None),
    ],
)
def test_classes_of_labels_are_read_by_their_names(names, chosen, tmp_path):
    dataset = labelled(names)
    dataset.to_parquet(tmp_path / "rows.parquet")
    readers = [
        lambda: PreferencePairs.from_dataset(dataset),
        lambda: PreferencePairs.from_dataset(dataset.to_iterable_dataset()),
        lambda: PreferencePairs.from_file(tmp_path / "rows.parquet"),
    ]
    for read in readers:
        if chosen is not None:
            assert read().chosen == [chosen]
        else:
            with pytest.raises(PreferenceDataError, match=rf"column 'label': got the class '{names[0]}'; expected"):
                read()


def test_an_unknown_class_is_no_label():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        prompt=datasets.Value("string"),
        completion=datasets.Value("string"),
        label=datasets.ClassLabel(names=["no", "yes"]),
    )
    rows = {"prompt": ["p"] * 3, "completion": ["Oak", "Ash", "Table"], "label": [1, -1, 0]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    with pytest.raises(PreferenceDataError, match=r"row 2 .*column 'label': the value is empty"):
        PreferencePairs.from_dataset(dataset)


def test_rows_of_pandas_have_arrays_and_nan():
    rows = [
        {
            "prompt": np.array([{"role": "user", "content": "Name a tree."}], dtype=object),
            "question": math.nan,
            "chosen": np.array([{"role": "assistant", "content": "Oak", "tool_calls": None}], dtype=object),
            "rejected": {"role": ["assistant"], "content": ["Table"]},
            "group": np.float64("nan"),
        }
    ]
    pairs = PreferencePairs.from_rows(rows)
    assert pairs[0]["chosen"] == [{"role": "assistant", "content": "Oak"}]
    assert (pairs.prompts, pairs.chosen, pairs.rejected) == (["Name a tree."], ["Oak"], ["Table"])
    assert pairs.group is None


def test_tool_calls_read_the_same_from_a_table():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    filled = {
        "id": None,
        "function": {"name": "weather", "arguments": {"city": "Rome", "unit": None}},
        "type": "function",
    }
    given = [
        [{"role": "assistant", "tool_calls": [call, call]}],
        [{"role": "assistant", "content": None, "tool_calls": np.array([filled, filled], dtype=object), "name": None}],
    ]
    texts = [PreferencePairs.from_rows([{"prompt": "p", "chosen": c, "rejected": "no"}]).chosen[0] for c in given]
    line = '{"name": "weather", "arguments": {"city": "Rome"}}'
    assert texts == [f"{line}\n{line}"] * 2


@pytest.mark.parametrize("prompt", ["Name a tree.", [{"role": "system", "content": "Be brief."}]])
def test_whole_conversations_beside_a_prompt_of_another_form(prompt):
    start = [] if isinstance(prompt, list) else [{"role": "system", "content": "Be brief."}]
    start += message("user", "Name a tree.")
    row = {
        "prompt": prompt,
        "chosen": start + message("assistant", "Oak"),
        "rejected": start + message("assistant", "No"),
    }
    pairs = PreferencePairs.from_rows([row])
    assert pairs.prompts == ["system: Be brief.\nuser: Name a tree."]
    assert (pairs.chosen, pairs.rejected) == (["Oak"], ["No"])


def test_a_table_of_pandas_is_refused_with_the_way_out():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match=r"(?s)got DataFrame .*; pass rows\.to_dict\('records'\)"):
        PreferencePairs.from_rows(pandas.DataFrame([{"prompt": "p", "chosen": "x", "rejected": "y"}]))


def test_votes_name_the_column_of_their_prompts():
    rows = [{"ask": q, "a": c, "b": r, "votes_a": 3, "votes_b": 1} for q, c, r in THREE]
    with pytest.raises(PreferenceDataError, match=r"'ask' may hold the prompts.*prompt_key='ask'"):
        PreferencePairs.from_votes(rows)
    assert PreferencePairs.from_votes(rows, prompt_key="ask").prompts == [q for q, _, _ in THREE]


def test_label_finds_prompts_and_candidates_in_a_table(tmp_path):
    rows = [("question", "candidates"), ("Name a tree.", '["Oak", "Table"]'), ("Name a fish.", "['Pike', 'Oak']")]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    for source, options in (("question", []), ("ask", ["--prompt-key", "ask"])):
        path = tmp_path / f"{source}.csv"
        path.write_text((tmp_path / "rows.csv").read_text().replace("question", source))
        out = tmp_path / f"{source}.jsonl"
        command = ["label", str(path), "--out", str(out), "--judge", "pattern:Oak", "--no-progress", *options]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        pairs = PreferencePairs.from_file(out)
        assert list(zip(pairs.prompts, pairs.chosen, pairs.rejected, strict=True)) == [
            ("Name a tree.", "Oak", "Table"),
            ("Name a fish.", "Oak", "Pike"),
        ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04\x14\x00", "an Excel or OpenDocument workbook; save the sheet as CSV in UTF-8"),
        (
            gzip.compress(b"prompt,chosen,rejected\na,b,c\n", mtime=0),
            r"compressed by gzip; let its name end in \.gz",
        ),
        (b"PAR1\x15\x04", r"Parquet; let its name end in \.parquet"),
        ("prompt,chosen,rejected\na,b,c\n".encode("utf-16")[:-1], "not valid UTF-16, which its byte order mark says"),
        (b"prompt;chosen;rejected;a,b,c,d,e\nx;y;z;\n;;;\n", None),
        (b"\n,,\nprompt,chosen,rejected\nx,y,z\n", None),
        (b"prompt,chosen,rejected\rx,y,z\r", None),
        (b'"sep=,"\r\n"prompt","chosen","rejected"\r\nx,y,z\r\n', None),
    ],
)
def test_other_files_named_csv_are_read_or_named(content, message, tmp_path):
    (tmp_path / "rows.csv").write_bytes(content)
    if message is None:
        pairs = PreferencePairs.from_file(tmp_path / "rows.csv")
        assert (pairs.prompts, pairs.chosen, pairs.rejected) == (["x"], ["y"], ["z"])
        return
    with pytest.raises(PreferenceDataError, match=message):
        PreferencePairs.from_file(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    ("cells", "stops"),
    [
        (["Why is it so?", "And how?", "Who?"], True),
        (["dogs", "cats", "birds"], True),
        (["なぜ空は青いの", "なぜ海は青いの", "なぜ草は緑なの"], True),
        ([message_of("Hi"), message_of("Ho"), message_of("Ha")], True),
        ([None, "What else is there?", None], True),
        (["reddit", "reddit", "reddit"], False),
        (["a1", "b2", "c3"], False),
        (["gpt-4", "gpt-5", "m_2"], False),
        (["2024-05-01 10:00", "2024-05-02 11:00", "2024-05-02 12:00"], False),
        (["https://x.org/a", "https://x.org/b", "https://x.org/c"], False),
        ([1, 2.5, 3], False),
        ([None, "", " "], False),
    ],
)
def test_only_a_column_that_could_hold_prompts_stops_reading(cells, stops):
    rows = [{"other": cell, "chosen": f"good {n}", "rejected": f"bad {n}"} for n, cell in enumerate(cells)]
    if stops:
        with pytest.raises(PreferenceDataError, match="'other' may hold the prompts"):
            PreferencePairs.from_rows(rows)
    else:
        assert PreferencePairs.from_rows(rows).prompts == [""] * 3


def test_text_beside_a_recognised_prompt_is_noted(caplog):
    rows = [{"question": q, "context": f"Facts on {q}", "chosen": c, "rejected": r} for q, c, r in THREE]
    pairs = PreferencePairs.from_rows(rows)
    assert pairs.notes == ["columns of text that are not part of the prompt: 'context'"]
    assert "not part of the prompt" in str(pairs.summary())
    assert caplog.text.count("not part of the prompt") == 1
    system = PreferencePairs.from_rows(
        [{"prompt": q, "system": "Be kind.", "chosen": c, "rejected": r} for q, c, r in THREE]
    )
    assert system.prompts == [q for q, _, _ in THREE]
    assert system.notes == ["columns of text that are not part of the prompt: 'system'"]


def test_empty_prompts_are_noted_with_their_rows():
    rows = [{"prompt": "" if n % 3 == 0 else f"p {n}", "chosen": "x", "rejected": "y"} for n in range(1, 25)]
    (note,) = PreferencePairs.from_rows(rows).notes
    assert note.startswith("8 of 24 rows have an empty prompt (row 3, 6, 9, 12, 15 and 3 more)")
    assert not PreferencePairs.from_rows([row | {"prompt": ""} for row in rows]).notes


# --- one notion of identity -----------------------------------------------------------------------------------------


def test_forms_of_one_prompt_stay_on_one_side_of_a_split():
    forms = [str, str.upper, lambda text: f" {text}\n", lambda text: text.replace(" ", "\u00a0 ")]
    rows = [
        {"prompt": forms[form](f"What is question {n}, café?"), "chosen": f"good {form}", "rejected": "bad"}
        for n in range(8)
        for form in range(4)
    ]
    pairs = PreferencePairs.from_rows(rows)
    assert pairs.summary().prompts == 8
    for seed in range(4):
        train, held_out = pairs.split(0.25, seed)
        assert len(held_out) == 8
        numbers = [{re.sub(r"\D", "", prompt) for prompt in side.prompts} for side in (train, held_out)]
        assert not numbers[0] & numbers[1]
        order = np.random.default_rng(seed).permutation(len(pairs))
        assert sorted(pairs.select(order).split(0.25, seed)[1].prompts) == sorted(held_out.prompts)
    encoded = pairs.encode(SurfaceEncoder(), progress=False)
    assert encoded.group.tolist() == [n for n in range(8) for _ in range(4)]


def test_rows_without_a_group_are_identified_by_their_prompts():
    groups = [math.nan, None, "", " ", "nan", float("nan")]
    rows = [
        {"prompt": f"p {n}", "chosen": "x", "rejected": "y", "group": groups[n % 6]} for n in range(40)
    ]  # one group of NaN would leave four rows on one side and 36 on the other
    pairs = PreferencePairs.from_rows(rows)
    assert pairs.group is None
    assert len(pairs.split(0.1, by="group")[1]) == 4
    scored = PreferencePairs.from_scores(["p", "q"], [["a", "b"]] * 2, [[0, 1]] * 2, group=[math.nan, "g"])
    assert scored.group == [None, "g"]


def test_all_parts_have_contexts_or_none():
    rows = [{"prompt": f"p {n}" if n else "", "chosen": "x y", "rejected": "z"} for n in range(5)]
    pairs = PreferencePairs.from_rows(rows)
    part = pairs.select([0])
    assert part.prompts == [""]
    for some in (part, part.swap(), part.shuffle_labels(), pairs[1:]):
        assert some.encode(SurfaceEncoder(), progress=False).context_dimension > 0
    bare = PreferencePairs.from_rows([row | {"prompt": ""} for row in rows])
    assert bare.encode(SurfaceEncoder(), progress=False).context is None


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ([3, 1, 3], [3, 1, 3]),
        ([0.2, 0.9, 1.4], [0, 1, 2]),
        ([2.0, 7.0, 2.0], [2, 7, 2]),
        (torch.tensor([0.9, 0.2, 0.9]), [1, 0, 1]),
        (["b", "a", "b"], [1, 0, 1]),
        (np.array([True, False, True]), [1, 0, 1]),
    ],
)
def test_groups_of_tensors_are_never_truncated(group, expected):
    assert EncodedPairs(torch.eye(3), -torch.eye(3), group=group).group.tolist() == expected


@pytest.mark.parametrize("group", [[0.0, math.nan, 1.0], ["a", None, "b"]])
def test_a_pair_without_a_group_is_refused_beside_tensors(group):
    with pytest.raises(ValueError, match=r"group must name the group of every pair: row 1"):
        EncodedPairs(torch.eye(3), -torch.eye(3), group=group)


# --- whatever is read ---------------------------------------------------------------------------------------------

words = st.text(
    alphabet=st.sampled_from(list("ab é'\"\\,;|\t[]{}:\n東?=")) | st.characters(exclude_categories=["Cs", "Cc"]),
    min_size=1,
    max_size=12,
)
SIDES = ("prompt", "chosen", "rejected")


def message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def csv_file(rows: list[dict[str, Any]], delimiter: str, encoding: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode(encoding)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@example(rows=[("a", "b", "c")], form="repr", column="prompt", suffix=".csv", delimiter=";", encoding="utf-16")
@given(
    rows=st.lists(st.tuples(words, words, words), min_size=1, max_size=4),
    form=st.sampled_from(["strings", "messages", "json", "repr", "transcripts"]),
    column=st.sampled_from(["prompt", "question", "query", "instruction", "messages"]),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".parquet", "rows", "dataset"]),
    delimiter=st.sampled_from([",", ";", "\t", "|"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_rows_round_trip_or_are_refused_with_their_place(
    rows, form, column, suffix, delimiter, encoding, tmp_path_factory
):
    given_rows: list[dict[str, Any]] = []
    for sides in rows:
        if form == "transcripts":
            head = f"\n\nHuman: {sides[0]}\n\nAssistant:"
            given_rows.append({"chosen": f"{head} {sides[1]}", "rejected": f"{head} {sides[2]}"})
            continue
        row: dict[str, Any] = dict(zip((column, *SIDES[1:]), sides, strict=True))
        if form != "strings":
            row = {name: message("user" if name == column else "assistant", text) for name, text in row.items()}
        if form in ("json", "repr"):
            row = {name: (json.dumps if form == "json" else repr)(text) for name, text in row.items()}
        given_rows.append(row)
    if suffix == ".csv" and form == "messages":
        return  # a cell holds no list
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    pairs = read_rows(given_rows, path, suffix, delimiter, encoding)
    if isinstance(pairs, PreferenceDataError):
        assert pairs.row is not None or pairs.reason == "no prompt column"
        assert pairs.source
        return
    expected = rows
    if form == "transcripts":
        expected = [(f"\n\nHuman: {q}\n\nAssistant:", f" {c}", f" {r}") for q, c, r in rows]
    assert list(zip(pairs.prompts, pairs.chosen, pairs.rejected, strict=True)) == expected


def read_rows(
    rows: list[dict[str, Any]], path: Path, suffix: str, delimiter: str, encoding: str
) -> PreferencePairs | PreferenceDataError:
    try:
        return written_and_read(rows, path, suffix, delimiter, encoding)
    except PreferenceDataError as error:
        return error


def written_and_read(
    rows: list[dict[str, Any]], path: Path, suffix: str, delimiter: str, encoding: str
) -> PreferencePairs:
    if suffix == "rows":
        return PreferencePairs.from_rows(rows)
    if suffix == "dataset":
        return PreferencePairs.from_dataset(pytest.importorskip("datasets").Dataset.from_list(rows))
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        content = {
            ".jsonl": lambda: "".join(json.dumps(row) + "\n" for row in rows).encode(),
            ".json": lambda: json.dumps(rows).encode(),
            ".csv": lambda: csv_file(rows, delimiter, encoding),
        }
        path.write_bytes(content[suffix]())
    return PreferencePairs.from_file(path)
