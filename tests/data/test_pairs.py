"""PreferencePairs: row formats, bad input, splits, controls, encoding."""

import csv
import gzip
import hashlib
import itertools
import json
import logging
import lzma
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.places import data_path

from pfm.data import PreferenceDataError, PreferencePairs
from pfm.data.candidates import CandidateGroup
from pfm.data.conversations import conversation_text
from pfm.data.implicit import split_prompt

ROWS = [
    {"prompt": "Name a colour.", "chosen": "Blue, like the sea.", "rejected": "No.", "margin": 2.5},
    {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "No.", "margin": None},
    {"prompt": "Greet the king.", "chosen": "Good morning, sire.", "rejected": "Hey", "margin": 1},
]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def texts(pairs: PreferencePairs) -> list[tuple[str, str, str]]:
    return list(zip(pairs.prompts, pairs.chosen, pairs.rejected, strict=True))


class HashEncoder:
    """Maps a text to eight numbers made of its digest, and remembers what it was asked."""

    def __init__(self):
        self.asked: list[list[str]] = []

    def encode(self, texts, *, progress=False):
        self.asked.append(list(texts))
        digests = [hashlib.sha256(text.encode()).digest()[:8] for text in texts]
        return torch.tensor([list(digest) for digest in digests], dtype=torch.float32) / 255

    def encode_prompts(self, texts, *, progress=False):
        return self.encode(["query: " + text for text in texts], progress=progress)[:, :4]

    def describe(self):
        return {"name": "hash", "dimension": 8}

    def one(self, text):
        return self.encode([text])[0]


# --- files ---------------------------------------------------------------------------------------------------


def as_jsonl(path):
    return write(path.with_suffix(".jsonl"), lines(ROWS))


def as_jsonl_gz(path):
    return write(path.with_suffix(".jsonl.gz"), gzip.compress(lines(ROWS).encode()))


def as_json_xz(path):
    return write(path.with_suffix(".json.xz"), lzma.compress(json.dumps(ROWS).encode()))


def as_json(path):
    return write(path.with_suffix(".json"), json.dumps(ROWS, indent=1))


def as_csv(path):
    path = path.with_suffix(".csv")
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def as_parquet(path):
    import pyarrow
    import pyarrow.parquet

    path = path.with_suffix(".parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("make", [as_jsonl, as_jsonl_gz, as_json, as_json_xz, as_csv, as_parquet])
def test_every_file_format_gives_the_same_pairs(tmp_path, make):
    pairs = PreferencePairs.from_file(make(tmp_path / "rows"))
    assert texts(pairs) == [(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]
    assert [None if value is None else float(value) for value in pairs.extra["margin"]] == [2.5, None, 1.0]
    assert pairs.weight is None  # a margin is no weight
    assert pairs.probability is None
    assert pairs.group is None
    assert not pairs.dropped


def test_loads_a_dataset_and_refuses_a_dictionary_of_splits():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    expected = texts(PreferencePairs.from_rows(ROWS))
    assert texts(PreferencePairs.from_dataset(dataset)) == expected
    assert texts(PreferencePairs.from_dataset(dataset.to_iterable_dataset())) == expected
    with pytest.raises(PreferenceDataError, match=r"splits 'train'.*dataset\[\"train\"\]"):
        PreferencePairs.from_dataset(datasets.DatasetDict(train=dataset))
    with pytest.raises(TypeError, match="from_rows"):
        PreferencePairs.from_dataset(ROWS)


def test_conversations_come_through_parquet_and_csv(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": [user("Hi")], "chosen": [assistant("Hello, you")], "rejected": [assistant("What")]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        writer.writerow([json.dumps(cell) for cell in rows[0].values()])
    for name in ("rows.parquet", "rows.csv"):
        pairs = PreferencePairs.from_file(tmp_path / name)
        assert pairs[0] == rows[0]
        assert texts(pairs) == [("Hi", "Hello, you", "What")]


def test_jsonl_may_have_a_byte_order_mark_and_other_line_ends(tmp_path):
    content = "\ufeff" + lines(ROWS).replace("\n", "\r\n\r\n")
    pairs = PreferencePairs.from_file(write(tmp_path / "ROWS.JSONL", content))
    assert texts(pairs) == texts(PreferencePairs.from_rows(ROWS))


def test_unknown_suffix_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"\.jsonl.*from_csv"):
        PreferencePairs.from_file(tmp_path / "rows.txt")


def test_missing_parquet_reader_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "preference-flow\[parquet\]"'):
        PreferencePairs.from_parquet(tmp_path / "rows.parquet")


def test_loading_text_imports_no_optional_package():
    code = (
        "import sys, pfm.data.pairs as p; p.PreferencePairs.from_rows([dict(prompt='a', chosen='b', rejected='c')]);"
        "print([m for m in ('datasets', 'pyarrow', 'pandas', 'sentence_transformers', 'rich') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# --- row formats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is black.", ("The sky is", " blue.", " black.")),
        ("The sky is", "The sky is blue", ("The sky", " is", " is blue")),
        ("The sky is ", "The sky is blue", ("The sky", " is ", " is blue")),
        ("one\ntwo", "one three", ("one", "\ntwo", " three")),
        ("Human: hi\n\nAssistant: Yes", "Human: hi\n\nAssistant: No", ("Human: hi\n\nAssistant:", " Yes", " No")),
        ("yes", "no", ("", "yes", "no")),
        ("blue", "black", ("", "blue", "black")),
        (" blue", " black", ("", " blue", " black")),
        ("foot", "foot ball", ("", "foot", "foot ball")),
        ("日本 東京", "日本 京都", ("日本", " 東京", " 京都")),
    ],
)
def test_implicit_prompt_of_strings(chosen, rejected, expected):
    assert split_prompt(chosen, rejected) == expected
    pairs = PreferencePairs.from_rows([{"chosen": chosen, "rejected": rejected}])
    assert texts(pairs) == [expected]


wordy = st.text(alphabet=st.sampled_from(["a", "b", "é", " ", "\n", "\u3000"]), min_size=1, max_size=25)


@given(wordy, wordy, wordy)
def test_implicit_prompt_is_the_longest_shared_beginning_of_whole_words(shared, first, second):
    first, second = shared + first, shared + second
    if not first.strip() or not second.strip() or first.strip() == second.strip():
        return
    prompt, chosen, rejected = map(str, split_prompt(first, second))
    assert prompt + chosen == first
    assert prompt + rejected == second
    assert chosen.strip()
    assert rejected.strip()
    assert not prompt or (chosen[0].isspace() and rejected[0].isspace())
    assert split_prompt(second, first) == (prompt, rejected, chosen)
    assert split_prompt(chosen, rejected) == ("", chosen, rejected)

    def whole_words(cut):
        boundary = first[cut : cut + 1].isspace() and second[cut : cut + 1].isspace()
        return boundary and first[:cut] == second[:cut] and first[cut:].strip() and second[cut:].strip()

    longest = max((cut for cut in range(min(len(first), len(second))) if whole_words(cut)), default=0)
    assert prompt == first[:longest].rstrip()


turns = st.lists(st.sampled_from([user("q"), user("r"), assistant("s"), assistant("t")]), max_size=4)


@given(turns, turns, turns)
def test_implicit_prompt_of_conversations_is_whole_turns(shared, first, second):
    first, second = shared + first, shared + second
    if not first or not second:
        return
    prompt, chosen, rejected = map(list, split_prompt(first, second))
    assert prompt + chosen == first
    assert prompt + rejected == second
    assert chosen
    assert rejected
    assert chosen[0] != rejected[0] or min(len(chosen), len(rejected)) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "What"},
        {"prompt": [user("Hi")], "chosen": [assistant("Hello")], "rejected": [assistant("What")]},
        {"prompt": [user("Hi")], "chosen": "Hello", "rejected": assistant("What")},
        {"chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Hi"), assistant("What")]},
        {"prompt": "Hi", "chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Hi"), assistant("What")]},
        {
            "prompt": [user("Hi")],
            "chosen": [user("Hi"), assistant("Hello")],
            "rejected": [user("Hi"), assistant("What")],
        },
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "What"},
        },
    ],
)
def test_every_way_to_write_a_pair_gives_the_same_texts(row):
    assert texts(PreferencePairs.from_rows([row])) == [("Hi", "Hello", "What")]


def test_conversation_text():
    assert conversation_text("as it is") == "as it is"
    assert conversation_text([user("alone")]) == "alone"
    assert conversation_text([assistant("alone")]) == "alone"
    assert conversation_text([]) == ""
    assert conversation_text([{"role": "system", "content": "Be kind."}]) == "system: Be kind."
    assert conversation_text([user("a"), assistant("b"), user("c")]) == "user: a\nassistant: b\nuser: c"
    with pytest.raises(PreferenceDataError, match=r"turn 2 is .*expected"):
        conversation_text([user("a"), {"role": "user"}])


def test_renamed_columns_and_kept_extras():
    rows = [{"q": "a", "good": "b", "bad": "c", "trust": "0.5", "debate": 7, "source": {"x": [1]}, "prompt": "z"}]
    pairs = PreferencePairs.from_rows(
        rows, prompt_key="q", chosen_key="good", rejected_key="bad", weight_key="trust", group_key="debate"
    )
    assert pairs[0] == {"prompt": "a", "chosen": "b", "rejected": "c", "weight": 0.5, "group": 7, "source": {"x": [1]}}
    with pytest.raises(PreferenceDataError, match=r"column 'p'.*missing; columns found: 'q', 'good'.*prompt_key="):
        PreferencePairs.from_rows(rows, prompt_key="p", chosen_key="good", rejected_key="bad")


def test_numbers_missing_in_some_rows_count_as_one():
    pairs = PreferencePairs.from_rows(
        [{**ROWS[0], "weight": 3, "probability": 0.75}, ROWS[1], {**ROWS[2], "weight": 0}]
    )
    assert pairs.weight == [3.0, 1.0, 0.0]
    assert pairs.probability == [0.75, 1.0, 1.0]


def test_unpaired_rows_make_liked_times_disliked():
    rows = [
        {"prompt": "p", "completion": "good 1", "label": True, "weight": 2},
        {"prompt": [user("p")], "completion": [assistant("bad 1")], "label": "false", "weight": 3},
        {"prompt": "other", "completion": "fine", "label": 1},
        {"prompt": "p", "completion": "good 2", "label": "True"},
        {"prompt": "other", "completion": "poor", "label": 0},
    ]
    pairs = PreferencePairs.from_rows(rows)
    assert texts(pairs) == [("p", "good 1", "bad 1"), ("p", "good 2", "bad 1"), ("other", "fine", "poor")]
    assert pairs.weight == [6.0, 3.0, 1.0]

    one_sided = [*rows, {"prompt": "lonely", "completion": "x", "label": True}]
    with pytest.raises(PreferenceDataError, match=r"row 6 .*all 1 completions of this prompt have label true"):
        PreferencePairs.from_rows(one_sided)
    kept = PreferencePairs.from_rows(one_sided, on_bad_rows="drop")
    assert texts(kept) == texts(pairs)
    assert kept.dropped == {"prompt with one label only": 1}
    with pytest.raises(PreferenceDataError, match="labelled both true and false"):
        PreferencePairs.from_rows([*rows, {"prompt": "p", "completion": "good 1", "label": False}])


def test_unpaired_rows_can_be_limited_and_must_be_when_they_are_millions():
    rows = [{"prompt": "p", "completion": f"text {n}", "label": n % 2 == 0} for n in range(3000)]
    with pytest.raises(ValueError, match=r"2,250,000 pairs; pass max_pairs_per_prompt="):
        PreferencePairs.from_rows(rows)
    pairs = PreferencePairs.from_rows(rows, max_pairs_per_prompt=50)
    assert len(set(texts(pairs))) == len(pairs) == 50
    number = {row["completion"]: row["label"] for row in rows}
    assert all(number[chosen] and not number[rejected] for _, chosen, rejected in texts(pairs))
    with pytest.raises(ValueError, match="max_pairs_per_prompt must be a whole number of at least 1, or None: got 0"):
        PreferencePairs.from_rows(rows, max_pairs_per_prompt=0)


# --- bad rows ------------------------------------------------------------------------------------------------

GOOD = json.dumps(ROWS[0]).encode() + b"\n"
BASE = {"prompt": "a", "chosen": "b", "rejected": "c"}
UNPAIRED = {"prompt": "a", "completion": "b"}


def without(*names):
    return {name: value for name, value in BASE.items() if name not in names}


@pytest.mark.parametrize(
    ("row", "message", "reason"),
    [
        (without("rejected"), r"column 'rejected': .*missing; columns found: 'prompt', 'chosen'", "missing column"),
        (without("prompt"), r"column 'prompt': the column is missing", "missing column"),
        ({**BASE, "chosen": None}, r"column 'chosen': the text is empty or only white space; expected", "empty text"),
        ({**BASE, "prompt": None}, r"column 'prompt': the value is empty", "empty value"),
        ({**BASE, "chosen": 3}, r"column 'chosen': got int 3; expected a string", "wrong type"),
        ({**BASE, "chosen": ["x"]}, r"turn 1 is str 'x'; expected \{'role'", "wrong type"),
        (["a", "b"], r"got list \['a', 'b'\]; expected an object", "wrong type"),
        ({**BASE, "chosen": "same", "rejected": " same"}, r"the same text, 'same'", "identical pair"),
        ({**BASE, "rejected": ""}, r"column 'rejected': the text is empty", "empty text"),
        ({**BASE, "chosen": " \n"}, r"column 'chosen': the text is empty or only white", "empty text"),
        ({**BASE, "chosen": [assistant(" ")]}, r"column 'chosen': the text is empty or only white", "empty text"),
        ({**BASE, "prompt": " \t"}, r"column 'prompt': the prompt is only white", "empty text"),
        ({**BASE, "weight": -1}, r"column 'weight': got int -1; expected a finite number ≥ 0", "bad number"),
        ({**BASE, "weight": float("nan")}, r"column 'weight': got float nan", "bad number"),
        ({**BASE, "weight": True}, r"column 'weight': got bool True", "bad number"),
        ({**BASE, "probability": 1.5}, r"column 'probability': .*from 0 to 1", "bad number"),
        ({**BASE, "group": []}, r"column 'group': got list", "wrong type"),
        ({**UNPAIRED, "label": "so-so"}, r"column 'label': got str 'so-so'; expected true or false", "wrong type"),
        (UNPAIRED, r"column 'label': the column is missing", "missing column"),
        ({**BASE, "chosen": "\ud800"}, r"column 'chosen': .*surrogate", "invalid Unicode"),
        (b'{"prompt": "a", "chosen"\n', r"not valid JSON \(Expecting ':'", "invalid JSON"),
        (b"[" * 100_000 + b"\n", r"not valid JSON", "invalid JSON"),
        (b'{"prompt": "\xff"}\n', r"byte 0xff at byte offset \d+; save the text as UTF-8", "invalid UTF-8"),
        (b'{"prompt": "a", "chosen": "b", "reje', r"the last line is cut short", "truncated last line"),
    ],
)
def test_a_bad_line_is_named_or_counted(tmp_path, caplog, row, message, reason):
    line = row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n"
    path = write(tmp_path / "rows.jsonl", GOOD + b"\n" + line)
    with pytest.raises(PreferenceDataError, match=message) as caught:
        PreferencePairs.from_jsonl(path)
    assert str(path) in str(caught.value)
    assert "line 3" in str(caught.value)
    assert 'on_bad_rows="drop"' in str(caught.value)
    assert caught.value.reason == reason
    assert not caplog.records

    with caplog.at_level(logging.WARNING):
        pairs = PreferencePairs.from_jsonl(path, on_bad_rows="drop")
    assert texts(pairs) == [texts(PreferencePairs.from_rows(ROWS[:1]))[0]]
    assert pairs.dropped == {reason: 1}
    assert len(caplog.records) == 1
    assert f"dropped 1 ({reason}: 1)" in caplog.text


def test_invalid_utf8_gives_the_offset_in_the_file(tmp_path):
    line = b'{"prompt": "caf\xe9", "chosen": "b", "rejected": "c"}\n'
    path = write(tmp_path / "rows.jsonl", GOOD + line)
    offset = len(GOOD) + line.index(b"\xe9")
    with pytest.raises(PreferenceDataError, match=rf"line 2: .*byte 0xe9 at byte offset {offset};"):
        PreferencePairs.from_jsonl(path)


def test_the_error_survives_a_process_boundary(tmp_path):
    with pytest.raises(PreferenceDataError) as caught:
        PreferencePairs.from_jsonl(write(tmp_path / "rows.jsonl", GOOD + b"{}\n"))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.column == "chosen"
    assert copy.row == "line 2"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz"])
@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_empty_file(tmp_path, name, content):
    path = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    for on_bad_rows in ("raise", "drop"):
        with pytest.raises(PreferenceDataError, match=r"no rows; expected at least one|the file is empty"):
            PreferencePairs.from_file(path, on_bad_rows=on_bad_rows)


def test_no_rows_and_nothing_left():
    with pytest.raises(PreferenceDataError, match="rows: there are no rows"):
        PreferencePairs.from_rows([])
    bad = [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 2 + [{"prompt": "a", "chosen": "", "rejected": "b"}]
    with pytest.raises(
        PreferenceDataError, match=r"all were dropped \(identical pair: 2, empty text: 1\).*row 1 \(rows\[0\]\)"
    ):
        PreferencePairs.from_rows(bad, on_bad_rows="drop")


def test_wrong_arguments():
    with pytest.raises(ValueError, match="on_bad_rows must be one of raise, drop: got 'skip'"):
        PreferencePairs.from_rows(ROWS, on_bad_rows="skip")
    for rows in ("rows.jsonl", ROWS[0], 3):
        with pytest.raises(TypeError, match=r"rows must be a list of dictionaries.*(from_file|for one row)"):
            PreferencePairs.from_rows(rows)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="promt_key"):
        PreferencePairs.from_rows(ROWS, promt_key="q")  # pyright: ignore[reportCallIssue]
    with pytest.raises(PreferenceDataError, match=r"chosen is str 'a' and rejected is list"):
        PreferencePairs.from_rows([{"chosen": "a", "rejected": [assistant("b")]}])


def test_damaged_compressed_file_keeps_what_was_read(tmp_path):
    rows = [{"prompt": f"prompt {n}", "chosen": os.urandom(500).hex(), "rejected": "no"} for n in range(1000)]
    whole = gzip.compress(lines(rows).encode())
    path = write(tmp_path / "rows.jsonl.gz", whole[: len(whole) // 2])
    with pytest.raises(PreferenceDataError, match=r"line \d+: the compressed file is damaged or cut short"):
        PreferencePairs.from_file(path)
    pairs = PreferencePairs.from_file(path, on_bad_rows="drop")
    assert 100 < len(pairs) < 600
    assert pairs.prompts == [row["prompt"] for row in rows[: len(pairs)]]
    assert pairs.dropped == {"damaged file": 1}
    with pytest.raises(PreferenceDataError, match=r"plain\.jsonl\.gz, line 1: the compressed file is damaged"):
        PreferencePairs.from_file(write(tmp_path / "plain.jsonl.gz", lines(rows)))
    with pytest.raises(PreferenceDataError, match=r"rows\.json\.xz: the compressed file is damaged"):
        PreferencePairs.from_file(write(tmp_path / "rows.json.xz", lzma.compress(b"[1, 2]")[:-20]))


def test_bad_json_files(tmp_path):
    with pytest.raises(PreferenceDataError, match=r"one object a line: rename it to \.jsonl or use from_jsonl"):
        PreferencePairs.from_json(write(tmp_path / "rows.json", lines(ROWS)))
    with pytest.raises(PreferenceDataError, match=r"not valid JSON \(Unterminated"):
        PreferencePairs.from_json(write(tmp_path / "rows.json", json.dumps(ROWS)[:-9]))
    with pytest.raises(PreferenceDataError, match=r"got dict .*; expected a JSON array"):
        PreferencePairs.from_json(write(tmp_path / "rows.json", json.dumps({"data": ROWS})))
    with pytest.raises(PreferenceDataError, match=r"rows\.json, row 2, column 'chosen'"):
        PreferencePairs.from_json(write(tmp_path / "rows.json", json.dumps([ROWS[0], {}])))
    with pytest.raises(PreferenceDataError, match="byte 0xff at byte offset 0"):
        PreferencePairs.from_json(write(tmp_path / "rows.json", b"\xff[]"))


def test_bad_csv_files(tmp_path):
    head = "prompt,chosen,rejected\n"

    def load(content, **options):
        return PreferencePairs.from_csv(write(tmp_path / "rows.csv", content), **options)

    with pytest.raises(PreferenceDataError, match=r"row 2 \(line 4\): got 4 cells; expected 3 .*quotes around commas"):
        load(head + "a,b,c\n\na,b,c,d\n")
    with pytest.raises(PreferenceDataError, match=r"row 1 \(line 2\): not valid CSV \(unexpected end of data\)"):
        load(head + 'a,"b,c\nd,e,f\n')
    with pytest.raises(PreferenceDataError, match="the header names 'chosen' twice"):
        load("prompt,chosen,chosen\na,b,c\n")
    with pytest.raises(PreferenceDataError, match=r"row 1 \(line 2\), column 'rejected': the column is missing"):
        load("prompt,chosen\na,b\n")
    with pytest.raises(PreferenceDataError, match="no rows"):
        load(head)
    latin = head.encode() + b"a,b,c\n" + "é,b,c\n".encode("latin-1") + b'd,"e\ne",f\n'
    with pytest.raises(PreferenceDataError, match=r"line 3: not valid UTF-8: byte 0xe9 at byte offset 29"):
        load(latin)
    pairs = load(latin, on_bad_rows="drop")
    assert texts(pairs) == [("a", "b", "c"), ("d", "e\ne", "f")]
    assert pairs.dropped == {"invalid UTF-8": 1}
    long = "x" * 200_000
    limit = csv.field_size_limit()
    assert load(head + f"a,{long},c\n").chosen == [long]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("prompt,chosen,rejected\na,b,c\na,b,\n", "row 2 (line 3)"),
        ('prompt,chosen,rejected\na,"b\nb\nb",c\n\na,b, \n', "row 2 (line 6)"),  # cells of several lines
        ("sep=;\r\nprompt;chosen;rejected\r\na;b;\r\n", "row 1 (line 3)"),
        ("\n\nprompt,chosen,rejected\na,b,\n", "row 1 (line 4)"),
    ],
)
def test_an_empty_cell_is_called_one_with_its_line_in_the_file(tmp_path, content, place):
    path = write(tmp_path / "rows.csv", content)
    with pytest.raises(PreferenceDataError) as caught:
        PreferencePairs.from_csv(path)
    assert f"{path}, {place}, column 'rejected': the text is empty or only white space" in str(caught.value)
    assert "columns found" not in str(caught.value)
    assert caught.value.reason == "empty text"


def test_columns_that_differ_in_case_only_are_read_and_said(tmp_path, caplog):
    pairs = PreferencePairs.from_csv(write(tmp_path / "rows.csv", "Prompt,CHOSEN,rejected,Note\na,b,c,d\n"))
    assert texts(pairs) == [("a", "b", "c")]
    assert any("the column 'Prompt' was read as 'prompt': the two differ in case" in note for note in pairs.notes)
    assert "column 'CHOSEN'" in caplog.text
    assert pairs[0]["Note"] == "d"
    two = [{"prompt": "a", "Chosen": "b", "CHOSEN": "x", "rejected": "c"}]  # which of them is not for us to say
    with pytest.raises(PreferenceDataError, match=r"column 'chosen': .*missing.*'Chosen' differs in case"):
        PreferencePairs.from_rows(two)
    exact = PreferencePairs.from_rows([{"prompt": "a", "chosen": "b", "rejected": "c", "Chosen": "x"}])
    assert (exact.chosen, exact[0]["Chosen"]) == (["b"], "x")


def test_bad_parquet_files(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = write(tmp_path / "rows.parquet", as_parquet(tmp_path / "whole").read_bytes()[:-30])
    with pytest.raises(PreferenceDataError, match=r"rows\.parquet: not a readable Parquet file"):
        PreferencePairs.from_parquet(path)
    with pytest.raises(FileNotFoundError):
        PreferencePairs.from_parquet(tmp_path / "absent.parquet")
    raw = pyarrow.array([b"fine", b"caf\xe9"]).view(pyarrow.string())
    table = pyarrow.table({"prompt": ["a", "b"], "chosen": raw, "rejected": ["c", "d"]})
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(PreferenceDataError, match=r"row 2: not valid UTF-8: byte 0xe9"):
        PreferencePairs.from_parquet(path)
    assert PreferencePairs.from_parquet(path, on_bad_rows="drop").chosen == ["fine"]


# --- scores, rankings, votes ---------------------------------------------------------------------------------


def test_scores_make_every_pair_ties_as_halves_and_keep_the_candidates():
    prompts, candidates = ["p", "q"], [["a", "b", "c"], ["d", "e"]]
    pairs = PreferencePairs.from_scores(prompts, candidates, [[1, 3, 1], np.array([0.5, -0.5])], group=["g", "h"])
    by_pair = dict(zip(texts(pairs), zip(pairs.extra["margin"], pairs.probability or (), strict=True), strict=True))
    assert by_pair == {
        ("p", "c", "a"): (0.0, 0.5),
        ("p", "b", "a"): (2.0, 1.0),
        ("p", "b", "c"): (2.0, 1.0),
        ("q", "d", "e"): (1.0, 1.0),
    }
    assert pairs.group == ["g", "g", "g", "h"]
    dropped = PreferencePairs.from_scores(prompts, candidates, [[1, 3, 1], [1, 2]], ties="drop")
    assert sorted(texts(dropped)) == [("p", "b", "a"), ("p", "b", "c"), ("q", "e", "d")]
    assert dropped.probability is None
    with pytest.raises(ValueError, match="ties must be one of half, drop: got 'keep'"):
        PreferencePairs.from_scores(prompts, candidates, [[1, 3, 1], [1, 2]], ties="keep")
    assert pairs.candidates == [
        CandidateGroup("p", ["a", "b", "c"], [1.0, 3.0, 1.0], "g"),
        CandidateGroup("q", ["d", "e"], [0.5, -0.5], "h"),
    ]


@given(st.lists(st.integers(0, 4), min_size=2, max_size=9), st.integers(1, 40), st.integers(0, 5))
def test_scores_agree_with_enumeration(scores, limit, seed):
    texts_ = [f"text {n}" for n in range(len(scores))]
    decided = {(a, b) for a, b in itertools.permutations(range(len(scores)), 2) if scores[a] > scores[b]}
    tied = {frozenset(two) for two in itertools.combinations(range(len(scores)), 2) if scores[two[0]] == scores[two[1]]}
    if not decided:
        with pytest.raises(PreferenceDataError, match=r"every prompt \(1\) have equal scores"):
            PreferencePairs.from_scores(["p"], [texts_], [scores])
        with pytest.raises(PreferenceDataError, match=r"prompt 1 \(prompts\[0\]\): all \d candidates have the score"):
            PreferencePairs.from_scores(["p"], [texts_], [scores], ties="drop")
        return

    def numbers(pairs):
        found = [(texts_.index(a), texts_.index(b)) for a, b in zip(pairs.chosen, pairs.rejected, strict=True)]
        halves = [p == 0.5 for p in pairs.probability or [1.0] * len(found)]
        return [frozenset(two) if half else two for two, half in zip(found, halves, strict=True)]

    for expected, ties in ((decided | tied, "half"), (decided, "drop")):
        everything = numbers(PreferencePairs.from_scores(["p"], [texts_], [scores], ties=ties))
        assert set(everything) == expected
        assert len(everything) == len(expected)
    some = numbers(PreferencePairs.from_scores(["p"], [texts_], [scores], max_pairs_per_prompt=limit, seed=seed))
    assert set(some) <= decided | tied
    assert len(set(some)) == len(some) == min(limit, len(decided | tied))


def test_a_limited_draw_is_seeded_and_spread():
    arguments = (["p"], [[f"text {n}" for n in range(3000)]], [list(range(3000))])
    with pytest.raises(ValueError, match=r"4,498,500 pairs; pass max_pairs_per_prompt="):
        PreferencePairs.from_scores(*arguments)
    first = PreferencePairs.from_scores(*arguments, max_pairs_per_prompt=400, seed=1)
    assert texts(first) == texts(PreferencePairs.from_scores(*arguments, max_pairs_per_prompt=400, seed=1))
    assert texts(first) != texts(PreferencePairs.from_scores(*arguments, max_pairs_per_prompt=400, seed=2))
    # uniform over pairs i > j of 3000: the winner's mean number is two thirds of 3000, its standard error 35
    assert np.mean([int(text.split()[1]) for text in first.chosen]) == pytest.approx(2000, abs=150)


def test_bad_scores_name_prompt_and_candidate():
    prompts, candidates = ["p", "q"], [["a", "b", "c"], ["d", "e"]]

    def load(scores, candidates=candidates, **options):
        return PreferencePairs.from_scores(prompts, candidates, scores, **options)

    with pytest.raises(PreferenceDataError, match=r"prompt 2, candidate 1 \(candidates\[1\]\[0\]\): the score is nan"):
        load([[1, 2, 3], [float("nan"), 2]])
    with pytest.raises(PreferenceDataError, match=r"candidate 3 .*the score is NoneType None"):
        load([[1, 2, None], [1, 2]])
    with pytest.raises(PreferenceDataError, match=r"prompt 2, candidate 2 .*empty or only white space"):
        load([[1, 2, 3], [1, 2]], candidates=[["a", "b", "c"], ["d", " "]])
    with pytest.raises(PreferenceDataError, match=r"prompt 2 .*got 0 usable candidates; expected at least two"):
        load([[1, 2, 3], []], candidates=[["a", "b", "c"], []])
    with pytest.raises(PreferenceDataError, match=r"prompt 1 .*the same text"):
        load([[1, 2, 3], [1, 2]], candidates=[["a", "a", "a"], ["d", "e"]])
    with pytest.raises(ValueError, match=r"candidates\[1\] and scores\[1\] must be lists of equal length"):
        load([[1, 2, 3], [1, 2, 3]])
    with pytest.raises(ValueError, match="scores must have one entry a prompt: got 1 for 2 prompts"):
        load([[1, 2, 3]])
    with pytest.raises(ValueError, match="group must have one entry a prompt: got 1 for 2 prompts"):
        load([[1, 2, 3], [1, 2]], group=["g"])

    pairs = load([[1, float("nan"), 3], [2, 2]], on_bad_rows="drop")
    assert texts(pairs) == [("p", "c", "a"), ("q", "e", "d")]
    assert pairs.probability == [1.0, 0.5]
    assert pairs.dropped == {"score not finite": 1}
    pairs = load([[1, float("nan"), 3], [2, 2]], on_bad_rows="drop", ties="drop")
    assert texts(pairs) == [("p", "c", "a")]
    assert pairs.dropped == {"score not finite": 1, "all ties": 1}
    assert pairs.candidates == [CandidateGroup("p", ["a", "c"], [1.0, 3.0])]
    with pytest.raises(PreferenceDataError, match=r"all were dropped \(all ties: 2\)"):
        load([[1, 1, 1], [2, 2]], on_bad_rows="drop", ties="drop")
    with pytest.raises(PreferenceDataError, match=r"every prompt \(2\) have equal scores"):
        load([[1, 1, 1], [2, 2]], on_bad_rows="drop")


def test_rankings_with_ties():
    pairs = PreferencePairs.from_rankings(
        ["p", [user("q")]], [["best", ["mid 1", "mid 2"], "worst"], [[assistant("x")], [assistant("y")]]]
    )
    assert {pair[1:] for pair in texts(pairs)[:6]} == {
        ("best", "mid 1"), ("best", "mid 2"), ("best", "worst"), ("mid 1", "worst"), ("mid 2", "worst"),
        ("mid 2", "mid 1"),
    }  # fmt: skip
    assert pairs.probability == [1.0 if margin else 0.5 for margin in pairs.extra["margin"]]
    assert texts(pairs)[6:] == [("q", "x", "y")]
    assert pairs.candidates[0].scores == [2.0, 1.0, 1.0, 0.0]
    with pytest.raises(PreferenceDataError, match="have equal scores"):
        PreferencePairs.from_rankings(["p"], [[["a", "b"]]])


def test_b_of_binary_scores_is_the_exact_one():
    """With one in ten good, a good output beats a draw with probability .95, a bad one with .45."""
    rng = np.random.default_rng(0)
    good = rng.random((600, 4)) < 0.1
    candidates = [[f"{n} {k} {'good' if good[n, k] else 'bad'}" for k in range(4)] for n in range(600)]
    pairs = PreferencePairs.from_scores([f"p{n}" for n in range(600)], candidates, good.astype(float))
    is_good, won = {}, {}
    for chosen, rejected, p in zip(pairs.chosen, pairs.rejected, pairs.probability or (), strict=True):
        for text, share in ((chosen, p), (rejected, 1 - p)):
            won.setdefault("good" in text, []).append(share)
            is_good[text] = "good" in text
    assert np.mean(won[True]) == pytest.approx(0.95, abs=0.02)
    assert np.mean(won[False]) == pytest.approx(0.45, abs=0.02)
    assert np.mean(list(is_good.values())) == pytest.approx(good.mean(), abs=1e-9)


VOTES = [
    {"prompt": "p", "a": "one", "b": "two", "votes_a": 1, "votes_b": 3, "votes_tie": 1, "topic": "t"},
    {"prompt": "p", "a": "one", "b": "three", "votes_a": "4", "votes_b": "0"},
    {"prompt": "q", "a": "five", "b": "six", "votes_a": 2, "votes_b": 2, "votes_tie": 1},
]


def test_votes_follow_the_formulas():
    pairs = PreferencePairs.from_votes(VOTES)
    assert texts(pairs) == [("p", "two", "one"), ("p", "one", "three"), ("q", "five", "six")]
    assert pairs.probability == [(3 + 0.5) / 5, 1.0, 0.5]
    assert pairs.weight == [5.0, 4.0, 5.0]
    assert pairs.extra == {"topic": ["t", None, None]}
    assert not pairs.dropped
    assert PreferencePairs.from_votes(VOTES, weight="margin").weight == [2.0, 4.0, 0.0]
    assert PreferencePairs.from_votes(VOTES, weight="one").weight == [1.0, 1.0, 1.0]
    hard = PreferencePairs.from_votes(VOTES, soft=False)
    assert hard.probability is None
    assert hard.weight == [5.0, 4.0]
    assert hard.dropped == {"tie": 1}
    decided = PreferencePairs.from_votes(VOTES, ties="drop")
    assert decided.probability == [0.7, 1.0]
    assert decided.dropped == {"tie": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"votes_a": -1}, r"row 1 .*column 'votes_a': got int -1"),
        ({"votes_a": float("nan")}, r"column 'votes_a': got float nan"),
        ({"votes_b": None}, r"column 'votes_b': the value is empty"),
        ({"votes_a": 0, "votes_b": 0, "votes_tie": 0}, r"nobody voted"),
        ({"b": " "}, r"column 'b': the text is empty"),
        ({"b": "one"}, r"the same text, 'one'"),
    ],
)
def test_bad_votes(change, message):
    rows = [{**VOTES[0], **change}, VOTES[1]]
    with pytest.raises(PreferenceDataError, match=message):
        PreferencePairs.from_votes(rows)
    pairs = PreferencePairs.from_votes(rows, on_bad_rows="drop")
    assert len(pairs) == 1
    assert sum(pairs.dropped.values()) == 1


def test_bad_vote_options():
    with pytest.raises(PreferenceDataError, match=r'all were dropped \(tie: 1\); ties="half" keeps ties'):
        PreferencePairs.from_votes(VOTES[2:], ties="drop")
    with pytest.raises(ValueError, match=r'ties="half" needs soft=True'):
        PreferencePairs.from_votes(VOTES, soft=False, ties="half")
    with pytest.raises(ValueError, match="weight must be one of total, one, margin, effective: got 'sum'"):
        PreferencePairs.from_votes(VOTES, weight="sum")


# --- rows, selections, controls ------------------------------------------------------------------------------


def test_rows_come_out_as_they_went_in():
    rows = [
        {"prompt": [user("Hi")], "chosen": [assistant("Hello")], "rejected": [assistant("What")], "weight": 2.0},
        {"prompt": "", "chosen": "x", "rejected": "y", "weight": 1.0, "group": 3, "note": "n"},
    ]
    pairs = PreferencePairs.from_rows(rows)
    assert len(pairs) == 2
    assert list(pairs) == rows
    assert pairs[-1] == rows[1]
    assert list(PreferencePairs.from_rows(list(pairs))) == rows
    with pytest.raises(IndexError):
        pairs[2]
    rows[0]["chosen"][0]["content"] = "changed later"
    assert pairs[0]["chosen"] == [assistant("Hello")]
    assert repr(pairs) == "PreferencePairs(rows=2, prompts=2)"


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.jsonl.xz"])
def test_written_rows_read_back(tmp_path, name):
    rows = [
        {"chosen": "The sky is blue — “so”\u2028.", "rejected": "The sky is black.", "score": np.float32(0.5)},
        {"chosen": "yes", "rejected": "no", "day": np.datetime64("2024-05-01").item()},
    ]
    pairs = PreferencePairs.from_rows(rows)
    pairs.to_jsonl(tmp_path / name)
    back = PreferencePairs.from_file(tmp_path / name)
    assert texts(back) == texts(pairs)
    assert back.extra == {"score": [0.5, None], "day": [None, "2024-05-01"]}
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write(tmp_path / "out.jsonl", "precious")
    pairs = PreferencePairs.from_rows([*ROWS, {**ROWS[0], "odd": {1, 2}}])
    with pytest.raises(TypeError, match=r"cannot write set .* as JSON"):
        pairs.to_jsonl(path)
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def many(prompts: int, rows: int = 3, **columns) -> PreferencePairs:
    return PreferencePairs.from_rows(
        [
            {
                "prompt": f"prompt {p}",
                "chosen": f"good {p} {r}",
                "rejected": f"bad {p} {r}",
                "id": p * rows + r,
                **columns,
            }
            for p in range(prompts)
            for r in range(rows)
        ]
    )


def test_select_takes_numbers_masks_and_slices():
    pairs = many(3, weight=2, probability=0.9, group="g")
    part = pairs.select([4, -1, 0])
    assert part.extra["id"] == [4, 8, 0]
    assert part.prompts == ["prompt 1", "prompt 2", "prompt 0"]
    assert (part.weight, part.probability, part.group) == ([2.0] * 3, [0.9] * 3, ["g"] * 3)
    assert pairs[2:8:3].extra["id"] == [2, 5]
    assert pairs.select(np.arange(9) % 4 == 0).extra["id"] == [0, 4, 8]
    assert len(pairs.select([])) == 0
    with pytest.raises(IndexError, match="row 9 does not exist: there are 9 rows"):
        pairs.select([0, 9])
    with pytest.raises(TypeError, match="row numbers or a mask"):
        pairs.select([0.5])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="a mask must have 9 entries"):
        pairs.select([True, False])


def test_candidates_stay_with_their_prompts():
    pairs = PreferencePairs.from_scores(["p", "q", "r"], [["a", "b"]] * 3, [[1, 0]] * 3)
    assert [entry.prompt for entry in pairs.select([2, 0]).candidates] == ["p", "r"]
    train, held_out = pairs.split(held_out=0.34)
    assert {entry.prompt for entry in train.candidates} == set(train.prompts)
    assert {entry.prompt for entry in held_out.candidates} == set(held_out.prompts)


def test_swap_and_shuffle_are_controls():
    pairs = PreferencePairs.from_scores([f"p{n}" for n in range(200)], [["a", "b"]] * 200, [[1, 0]] * 200)
    swapped = pairs.swap()
    assert swapped.chosen == pairs.rejected
    assert swapped.rejected == pairs.chosen
    assert swapped[0]["chosen"] == "b"
    assert swapped.candidates[0].scores == [-1.0, 0.0]
    assert texts(swapped.swap()) == texts(pairs)
    shuffled = pairs.shuffle_labels(seed=0)
    kept = sum(a == b for a, b in zip(shuffled.chosen, pairs.chosen, strict=True))
    assert 70 < kept < 130
    assert all({c, r} == {"a", "b"} for _, c, r in texts(shuffled))
    assert 70 < sum(entry.scores == [1.0, 0.0] for entry in shuffled.candidates) < 130
    assert texts(shuffled) == texts(pairs.shuffle_labels(seed=0)) != texts(pairs.shuffle_labels(seed=1))


# --- split ---------------------------------------------------------------------------------------------------


def linked_sets(rows, by) -> list[set]:
    """Join (prompt, group) rows by brute force: what shares a prompt - or, by group, a group - is one set."""
    sets: list[set] = []
    for prompt, group in rows:
        tags = {("prompt", prompt)} if prompt or group is None else {("group", group)}
        if by == "group":
            tags |= {("group", group)} - {("group", None)}
        touching = [other for other in sets if other & tags]
        sets = [other for other in sets if not other & tags] + [tags.union(*touching)]
    return sets


@given(
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from([None, "g", "h", 1])), min_size=1, max_size=20),
    st.floats(0.01, 0.99),
    st.integers(0, 99),
    st.sampled_from(["prompt", "group"]),
    st.randoms(use_true_random=False),
)
def test_split_never_leaks(rows, held_out, seed, by, random):
    pairs = PreferencePairs.from_rows(
        [
            {"prompt": f"prompt {p}" if p else "", "chosen": f"good {n}", "rejected": "bad", "group": g}
            for n, (p, g) in enumerate(rows)
        ]
    )
    units = linked_sets(rows, by)
    if len(units) < 2:
        with pytest.raises(ValueError, match="cannot hold a prompt out"):
            pairs.split(held_out=held_out, seed=seed, by=by)
        return
    train, test = pairs.split(held_out=held_out, seed=seed, by=by)
    assert sorted(train.chosen + test.chosen) == sorted(pairs.chosen)
    sides = [linked_sets([rows[int(text.split()[1])] for text in side.chosen], by) for side in (train, test)]
    assert not set().union(*sides[0]) & set().union(*sides[1])
    assert len(sides[1]) == min(max(round(held_out * len(units)), 1), len(units) - 1)

    order = list(range(len(pairs)))
    random.shuffle(order)
    again = pairs.select(order).split(held_out=held_out, seed=seed, by=by)[1]
    assert sorted(again.chosen) == sorted(test.chosen)


def test_split_counts_prompts_and_follows_the_seed():
    pairs = many(50)
    train, held_out = pairs.split(held_out=0.2, seed=3)
    assert len(set(held_out.prompts)) == 10
    assert len(train) + len(held_out) == 150
    assert held_out.prompts == pairs.split(held_out=0.2, seed=3)[1].prompts
    assert held_out.prompts != pairs.split(held_out=0.2, seed=4)[1].prompts
    assert len(set(pairs.split(held_out=0.001)[1].prompts)) == 1
    assert len(set(pairs.split(held_out=0.999)[0].prompts)) == 1
    # pinned: a split must not change from one process, or version, to the next
    assert sorted({int(prompt.split()[1]) for prompt in held_out.prompts}) == [2, 3, 13, 15, 19, 20, 26, 27, 28, 29]


def test_split_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"all 3 rows belong to one prompt; add rows of other prompts.*select\(\)"):
        many(1).split()
    with pytest.raises(ValueError, match="5 prompts are linked by their groups"):
        many(5, group="all").split(by="group")
    assert len(set(many(5, group="all").split(held_out=0.2)[1].prompts)) == 1
    with pytest.raises(ValueError, match="by must be"):
        many(5).split(by="row")
    for held_out in (0, 1, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="held_out must lie between 0 and 1"):
            many(3).split(held_out=held_out)


# --- describe and encode -------------------------------------------------------------------------------------


def test_describe():
    rows = [
        {"prompt": "p", "chosen": "a b c", "rejected": "a", "weight": 1},
        {"prompt": "p", "chosen": "a", "rejected": "x y", "weight": 3},
        {"prompt": "", "chosen": "one two", "rejected": "", "weight": 1},
        {"prompt": "", "chosen": "one two", "rejected": "[red]three[/red]", "weight": 2},
    ]
    summary = PreferencePairs.from_rows(rows, on_bad_rows="drop").summary()
    assert (summary.rows, summary.prompts, summary.responses, summary.without_prompt) == (3, 2, 5, 1)
    assert summary.chosen_words["50%"] == 2
    assert summary.chosen_longer == pytest.approx(2 / 3)
    assert summary.weight == {"min": 1.0, "mean": 2.0, "max": 3.0}
    assert summary.dropped == {"empty text": 1}
    assert "chosen is longer       66.7%" in str(summary)
    assert "empty text 1" in str(summary)


def test_describe_shows_data_as_data():
    from rich.console import Console

    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "[bold]": 1}]
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(PreferencePairs.from_rows(rows).summary())
    assert "other columns" in (shown := console.export_text())
    assert "[bold]" in shown


def test_encode_asks_for_every_text_once():
    rows = [{**ROWS[0], "weight": 2, "probability": 0.8}, ROWS[1], {**ROWS[2], "prompt": [user("Greet the king.")]}]
    pairs, encoder = PreferencePairs.from_rows(rows), HashEncoder()
    encoded = pairs.encode(encoder, progress=False)
    assert sorted(len(asked) for asked in encoder.asked) == [2, 5]
    for asked in encoder.asked:
        assert len(set(asked)) == len(asked)
    for n in range(3):
        assert torch.equal(encoded.chosen[n], encoder.one(pairs.chosen[n]))
        assert torch.equal(encoded.rejected[n], encoder.one(pairs.rejected[n]))
        assert encoded.context is not None
        assert torch.equal(encoded.context[n], encoder.one("query: " + pairs.prompts[n])[:4])
    assert encoded.group.tolist() == [0, 0, 1]
    assert encoded.weight is not None
    assert encoded.weight.tolist() == [2, 1, 1]
    assert encoded.probability is not None
    assert encoded.probability.tolist() == pytest.approx([0.8, 1, 1])
    assert encoded.encoder == {"name": "hash", "dimension": 8}
    assert encoded.candidates is None


def test_encode_without_contexts():
    encoder = HashEncoder()
    encoded = PreferencePairs.from_rows(ROWS).encode(encoder, context=False, progress=False)
    assert encoded.context is None
    assert encoded.group.tolist() == [0, 0, 1]
    assert len(encoder.asked) == 1
    assert encoded.weight is None
    assert encoded.probability is None
    bare = PreferencePairs.from_rows([{"prompt": "", "chosen": "a", "rejected": "b", "group": g} for g in "xyx"])
    assert bare.encode(encoder, progress=False).context is None
    assert bare.encode(encoder, progress=False).group.tolist() == [0, 1, 0]


def test_encode_hands_candidates_on():
    pairs = PreferencePairs.from_scores(["p", "q"], [["a", "b", "tie"], ["a", "c"]], [[2, 1, 1], [0, 5]], group=[1, 2])
    encoder = HashEncoder()
    encoded = pairs.select([len(pairs) - 1, 0]).encode(encoder, progress=False)
    assert encoded.candidates is not None
    by_prompt = dict(zip(["q", "p"], sorted(encoded.candidates, key=lambda entry: entry.context_index), strict=True))
    for prompt, entry in by_prompt.items():
        group = next(group for group in pairs.candidates if group.prompt == prompt)
        assert entry.scores.tolist() == group.scores
        assert torch.equal(encoded.output_rows(entry.rows), encoder.encode(group.texts))
        context = encoded.context_rows(torch.tensor([entry.context_index]))
        assert context is not None
        assert torch.equal(context[0], encoder.encode_prompts([prompt])[0])


def test_encode_uses_an_encoder_that_knows_no_prompts_and_refuses_one_that_loses_texts():
    class Plain:
        def encode(self, texts, *, progress=False):
            return HashEncoder().encode(texts)

    class Lossy(HashEncoder):
        def encode(self, texts, *, progress=False):
            return super().encode(texts)[1:]

    encoded = PreferencePairs.from_rows(ROWS).encode(Plain(), progress=False)
    assert encoded.context_dimension == 8
    assert encoded.encoder is None
    with pytest.raises(ValueError, match="one vector a text: got 1 for 2 texts"):
        PreferencePairs.from_rows(ROWS).encode(Lossy(), progress=False)


# --- real data -----------------------------------------------------------------------------------------------


def test_real_rows_in_the_conversations_format():
    path = data_path("dpo_demo", "dpo_en_demo.jsonl.gz")
    pairs = PreferencePairs.from_file(path)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(pairs) == len(rows) == 300
    assert pairs.chosen == [row["chosen"]["value"] for row in rows]
    assert pairs.rejected == [row["rejected"]["value"] for row in rows]
    first = rows[0]["conversations"][0]
    assert pairs[0]["prompt"] == [user(first["value"])]
    assert pairs.prompts[0] == first["value"]
    assert pairs.prompts[1].startswith("system: ")
    assert not pairs.extra
    train, held_out = pairs.split()
    assert not set(train.prompts) & set(held_out.prompts)
    summary = pairs.summary()
    assert summary.rows == 300
    assert 0 < summary.chosen_longer < 1
    encoded = pairs.encode(HashEncoder(), progress=False)
    assert len(encoded) == 300
    assert len(encoded.group.unique()) == summary.prompts


def test_scores_of_two_labels_keep_the_shares_that_unpaired_rows_even_out():
    """Members of liked-against-disliked pairs are half liked; with ties each answer stands in as many pairs."""
    labels = [True] + [False] * 9
    answers = [f"answer {n}" for n in range(10)]
    rows = [{"prompt": "p", "completion": a, "label": liked} for a, liked in zip(answers, labels, strict=True)]
    unpaired = PreferencePairs.from_rows(rows)
    scored = PreferencePairs.from_scores(["p"], [answers], [[float(liked) for liked in labels]])

    def liked_share(pairs: PreferencePairs) -> float:
        members = pairs.chosen + pairs.rejected
        return members.count("answer 0") / len(members)

    assert liked_share(unpaired) == 0.5
    assert liked_share(scored) == pytest.approx(0.1)
